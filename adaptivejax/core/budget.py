# SPDX-License-Identifier: Apache-2.0
"""From a budget to decisions: thresholds by calibration, losses by training.

Axes: n calibration samples, K exits (or layers).
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Host = Array | np.ndarray


def exit_fractions(q: float, exits: int) -> np.ndarray:
  """Target share of samples per exit, proportional to q^k, k = 1..K.

  Huang et al., 2018 (MSDNet), https://arxiv.org/abs/1703.09844; a small q means
  early exits, q = 1 an even spread.
  """
  if q <= 0 or exits < 1:
    raise ValueError(f"need {q=} above 0 and at least one exit; got {exits=}.")
  weights = np.power(float(q), np.arange(1, exits + 1))
  return weights / weights.sum()


def solve_exit_thresholds(
  confidence: Float[Host, "n K"], fractions: Float[Host, " E"]
) -> np.ndarray:
  """Thresholds that spread a calibration set over the exits as wished.

  At exit k, of the samples still there, the floor(n p_k) most confident leave:
  the threshold is the confidence of the last of them (MSDNet rule).  Runs on
  the host.

  Args:
    confidence: of each sample at each exit; higher is surer.
    fractions: wished share per exit, summing to 1.

  Returns:
    f32[K]; leave at the first k with confidence >= threshold; the last is -inf.
    Equal confidences cannot be told apart: all of them leave together, and the
    shares are missed.  Probabilities tie at 1; `logit_margin` does not, and
    meets the shares to 1/n.
  """
  confidence, p = np.asarray(confidence, np.float32), np.asarray(fractions)
  if confidence.ndim != 2 or p.shape != confidence.shape[1:]:
    raise ValueError(
      f"`confidence` must be [samples, exits] and `fractions` [exits]; got"
      f" {confidence.shape} and {p.shape}."
    )
  if (p < 0).any() or abs(p.sum() - 1) > 1e-4:
    raise ValueError(f"`fractions` must be shares that sum to 1; got {p}.")
  n, exits = confidence.shape
  thresholds = np.full(exits, -np.inf, np.float32)
  here = np.ones(n, bool)
  for k in range(exits - 1):
    leave = int(np.floor(n * p[k] + 1e-9))
    ranked = np.sort(confidence[here, k])[::-1]
    thresholds[k] = ranked[leave - 1] if 0 < leave <= ranked.size else np.inf
    here &= confidence[:, k] < thresholds[k]
  return thresholds


def exit_depth(
  confidence: Float[Host, "n K"], threshold: Float[Array, "..."] | float
) -> np.ndarray:
  """Layers run by each sample, 1..K: the first with confidence >= threshold."""
  sure = np.asarray(confidence, np.float32) >= np.asarray(threshold, np.float32)
  sure[:, -1] = True
  return sure.argmax(1) + 1


def solve_depth_threshold(
  confidence: Float[Host, "n K"], mean_depth: float
) -> float:
  """The lowest single threshold whose mean exit depth reaches `mean_depth`.

  Mean depth grows with the threshold, so bisection over the confidences that
  occur finds it exactly.  Runs on the host.
  """
  confidence = np.asarray(confidence, np.float32)
  exits = confidence.shape[1]
  if not 1 <= mean_depth <= exits:
    raise ValueError(
      f"{mean_depth=} is outside 1..{exits}, the depths there are."
    )
  levels = np.unique(confidence[:, :-1])
  levels = np.concatenate([[-np.inf], levels, [np.inf]]).astype(np.float32)
  low, high = 0, len(levels) - 1
  while low < high:
    middle = (low + high) // 2
    if exit_depth(confidence, float(levels[middle])).mean() >= mean_depth:
      high = middle
    else:
      low = middle + 1
  return float(levels[low])


def solve_setting(
  measure: Callable[[float], float],
  target: float,
  *,
  low: float,
  high: float,
  rounds: int = 12,
) -> float:
  """The lowest setting in [low, high] that spends at most `target`.

  Args:
    measure: realised share of compute at a setting; falls as it rises.
    target: wished share.
    low, high: range to bisect.
    rounds: halvings.

  Runs on the host; `measure` should be compiled once, the setting being data.

  Raises:
    ValueError: even `high` spends more than `target`.
  """
  if not 0 < target <= 1 or low >= high:
    raise ValueError(
      f"{target=} must be a share of compute in (0, 1], and {low=} below"
      f" {high=}."
    )
  least = measure(high)
  if least > target:
    raise ValueError(
      f"{target=} cannot be met: at the setting {high} the share of compute is"
      f" still {least:.3f}. Ask for that share or more."
    )
  for _ in range(rounds):
    middle = (low + high) / 2
    if measure(middle) > target:
      low = middle
    else:
      high = middle
  return high


def budget_loss(
  share: Float[Array, "..."],
  target: Float[Array, ""] | float,
  *,
  squared: bool = False,
) -> Float[Array, ""]:
  """Distance of the mean differentiable `share` of compute from `target`."""
  gap = share.mean() - target
  return gap**2 if squared else jnp.abs(gap)
