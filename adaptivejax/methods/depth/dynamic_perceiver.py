# SPDX-License-Identifier: Apache-2.0
r"""Dynamic Perceiver: exits sit on a branch of their own and share a budget.

Han et al., 2023, https://arxiv.org/abs/2306.11248
Huang et al., 2018 (MSDNet), https://arxiv.org/abs/1703.09844

A latent code reads the features and answers early, so that the features need
not be linearly separable.  Every exit learns the labels and, at temperature T,
the (detached) answer of the last exit, which reads both branches:

    loss = sum_k w_k CE_k + alpha T^2 sum_{k<K} KL(softmax(z_K / T) || z_k / T)

with w = 1/4, 1/4, 1/4, 1/2 for the two exits on the code, that on the features,
and the merged one.  A sample leaves at the first exit whose confidence reaches
that exit's threshold; the thresholds give exit k a share of the samples
proportional to s_k q^k on a calibration set, and one q is one budget.

Primitive: `solve_exit_thresholds`; the rule in a `depth_loop`.
Departs: the rule and the losses, on the exits of any host: the two branches
with their cross-attention are not here.  Confidence may be any, and had better
be `logit_margin` where the largest probability saturates to 1 and ties.
Axes: K exits, B batch, C classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.budget import exit_fractions
from adaptivejax.core.halting import max_prob
from adaptivejax.core.losses import cross_entropy

WEIGHTS = (0.25, 0.25, 0.25, 0.5)
"""Of the exits on the latent code, twice, on the features, and on both."""

SCALES = (0.85, 1.0, 0.5, 1.0)
"""How the shares of those exits are scaled."""


def perceiver_loss(
  logits: Float[Array, "K B C"],
  labels: Int[Array, " B"],
  weights: tuple[float, ...] = WEIGHTS,
  *,
  alpha: Array | float = 0.5,
  temperature: Array | float = 4.0,
) -> Float[Array, ""]:
  """The weighted losses of all exits, and their distance from the last.

  Args:
    weights: w, one per exit (static).
    alpha: weight of the distillation (dynamic).
    temperature: T, above 0 (dynamic).
  """
  if len(weights) != len(logits):
    raise ValueError(f"{weights=} must be one per exit, {len(logits)}.")
  task = jax.vmap(cross_entropy, (0, None))(logits, labels).mean(1)
  soft = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  last = jax.lax.stop_gradient(soft[-1])
  apart = (jnp.exp(last) * (last - soft[:-1])).sum(-1).mean(1)
  task = (jnp.asarray(weights) * task).sum()
  return task + alpha * temperature**2 * apart.sum()


def scaled_fractions(
  q: float, scales: tuple[float, ...] = SCALES
) -> np.ndarray:
  """Share of the samples per exit, proportional to s_k q^k."""
  if min(scales) < 0 or sum(scales) <= 0:
    raise ValueError(f"{scales=} must not be below 0, and not all of them 0.")
  shares = exit_fractions(q, len(scales)) * np.asarray(scales)
  return shares / shares.sum()


def budgeted_exit(
  l,
  logits: Float[Array, "B C"],
  pooled,
  memory,
  *,
  thresholds: Float[Array, " K"],
  confidence: Callable[[Array], Array] = max_prob,
) -> tuple[Bool[Array, " B"], None]:
  """The rule of a `Classifier`: leave where the confidence is high enough.

  Args:
    thresholds: one per exit, from `solve_exit_thresholds` (dynamic).
    confidence: of the logits, higher is surer (static).
  """
  del pooled
  return confidence(logits) >= thresholds[l], memory
