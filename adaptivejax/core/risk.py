# SPDX-License-Identifier: Apache-2.0
"""From calibration losses to a setting with a guarantee.

Runs on the host, in NumPy.  A setting is a threshold, a budget, a plan:
anything that makes a model cheaper, and its losses on calibration samples are
all that is read.  Samples must be independent: the tokens of one text are not,
so average a text into one sample.

Axes: n calibration samples, J settings.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float
from scipy import special, stats

Host = Array | np.ndarray

PValue = Callable[[np.ndarray, int, float], np.ndarray]
"""`(mean losses f[J], n, delta) -> p f[J]` of "the risk is above delta"."""


def hoeffding(
  risk: Float[Host, " J"], n: int, delta: float
) -> Float[np.ndarray, " J"]:
  """exp(-2 n max(0, delta - risk)^2), from Hoeffding's inequality."""
  return np.exp(-2 * n * np.maximum(0, delta - np.asarray(risk)) ** 2)


def hoeffding_bentkus(
  risk: Float[Host, " J"], n: int, delta: float
) -> Float[np.ndarray, " J"]:
  """A smaller p-value than Hoeffding's, above all where the risk is small.

      min(exp(-n KL(min(risk, delta), delta)), e P(Bin(n, delta) <= n risk))

  with KL between coins; Bates et al., 2021, https://arxiv.org/abs/2101.02703
  """
  risk = np.asarray(risk, np.float64)
  r = np.minimum(risk, delta)
  divergence = special.rel_entr(r, delta) + special.rel_entr(1 - r, 1 - delta)
  failures = np.ceil(n * risk - 1e-6)  # a mean in f32 may lie just above
  tail = np.e * stats.binom.cdf(failures, n, delta)
  return np.minimum(np.exp(-n * divergence), tail)


def check_promise(delta: float, epsilon: float) -> None:
  """Raises ValueError for a risk or a probability outside (0, 1)."""
  if not 0 < delta < 1 or not 0 < epsilon < 1:
    raise ValueError(f"{delta=} and {epsilon=} must lie between 0 and 1.")


def learn_then_test(
  losses: Float[Host, "n J"],
  *,
  delta: float,
  epsilon: float,
  p_value: PValue = hoeffding,
) -> int | None:
  """The cheapest setting whose risk is at most `delta`, almost surely.

  Fixed-sequence testing: from the safest setting on, reject "the expected loss
  is above delta" while p <= epsilon, and stop at the first that cannot be
  rejected.  Whatever the model and the data,

      P(expected loss of the returned setting <= delta) >= 1 - epsilon

  over the draw of the samples.  Angelopoulos et al., 2021,
  https://arxiv.org/abs/2110.01052

  Args:
    losses: of each sample under each setting, in 0..1; settings ordered from
      the safest to the cheapest, in an order that these losses had no say in.
      If it has to be found, find it on other samples: their Pareto front
      (Laufer-Goldshtein et al., 2022, https://arxiv.org/abs/2210.07913).
    delta: the risk to tolerate, in (0, 1).
    epsilon: the probability to be wrong, in (0, 1).
    p_value: `hoeffding`, `hoeffding_bentkus`, or another valid p-value.

  Returns:
    The index of the setting; None if not even the first is shown to be safe
    (then use the full model, or more samples).
  """
  losses = np.asarray(losses, np.float64)
  if losses.ndim != 2 or 0 in losses.shape:
    raise ValueError(
      "`losses` must be [samples, settings] with at least one of each; got"
      f" shape {losses.shape}."
    )
  if not ((losses >= 0) & (losses <= 1)).all():
    raise ValueError(
      "`losses` must lie in 0..1, which the p-values rest on; got"
      f" {losses.min()}..{losses.max()}. Scale or clip them."
    )
  check_promise(delta, epsilon)
  p = np.asarray(p_value(losses.mean(0), len(losses), delta))
  accepted = int(np.cumprod(p <= epsilon).sum())
  return accepted - 1 if accepted else None
