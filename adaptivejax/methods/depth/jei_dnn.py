# SPDX-License-Identifier: Apache-2.0
r"""JEI-DNN: gates learn where to leave together with the exits they feed.

Regol, Chataoui and Coates, 2023, https://arxiv.org/abs/2310.09163

The backbone is frozen.  A gate reads four numbers of its exit's probabilities,
max p, entropy, margin, and the entropy of p^2 renormalised, and says g_l =
sigmoid(w_l . f + b_l).  Exits are taken with probability

    P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)),  the last takes the remainder,

the exits learn sum_l P_l CE_l with P held fixed, so that each learns the rows
it will answer, and in turn the gates learn, by cross-entropy, to leave from the
best exit on, argmin_l CE_l + lambda c_l, with c the cost in 0..1.  Inference
leaves at the first l where P_l / (1 - sum_{j<l} P_j) >= 1/2.

Primitive: the sum of the gates in a `depth_loop`.
Departs: the published code rescales a row's loss to sum_l CE_l by a factor that
it differentiates, which cancels P altogether: not here.  As neither loss has a
slope for the other's parameters, the two may be added instead of alternated.
Axes: K exits, G = K - 1 gates, B batch, C classes.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from adaptivejax.core.halting import entropy, margin, max_prob
from adaptivejax.core.losses import binary_cross_entropy

stop = jax.lax.stop_gradient


def gate_features(logits: Float[Array, "... C"]) -> Float[Array, "... 4"]:
  """What a gate sees of an exit, detached from it."""
  logits = stop(logits)
  flat = entropy(logits), margin(logits), entropy(2 * logits)
  return jnp.stack([max_prob(logits), *flat], axis=-1)


class Gates(nnx.Module):
  """A linear gate for every exit but the last; untrained, all say 1/2."""

  def __init__(self, exits: int):
    if exits < 2:
      raise ValueError(f"gates stand between two or more exits; got {exits=}.")
    self.kernel = nnx.Param(jnp.zeros((exits - 1, 4)))
    self.bias = nnx.Param(jnp.zeros(exits - 1))

  def __call__(self, l, logits: Float[Array, "B C"]) -> Float[Array, " B"]:
    """The logit of g_l; l is dynamic, of the last exit it means nothing."""
    features = gate_features(logits)
    return features @ self.kernel.get_value()[l] + self.bias.get_value()[l]

  def every(self, logits: Float[Array, "K B C"]) -> Float[Array, "G B"]:
    """The logits of all gates."""
    features = gate_features(logits[:-1])
    scores = jnp.einsum("gbf,gf->gb", features, self.kernel.get_value())
    return scores + self.bias.get_value()[:, None]


def exit_probabilities(gates: Float[Array, "G B"]) -> Float[Array, "K B"]:
  """P of every exit, given the logits of the gates; sums to 1."""
  total = jnp.minimum(jnp.cumsum(jax.nn.sigmoid(gates), axis=0), 1)
  edge = lambda value: jnp.full_like(total[:1], value)
  return jnp.diff(jnp.concatenate([edge(0), total, edge(1)]), axis=0)


def exit_loss(
  losses: Float[Array, "K B"], p: Float[Array, "K B"]
) -> Float[Array, ""]:
  """sum_l P_l CE_l, mean over rows: what the exits learn.

  Args:
    losses: CE of each row at each exit.
    p: from `exit_probabilities`; held fixed.
  """
  return (stop(p) * losses).sum(0).mean()


def gate_labels(
  losses: Float[Array, "K B"], cost: Float[Array, " K"], tradeoff: Array | float
) -> Bool[Array, "G B"]:
  """Who should have left by each gate, at `tradeoff` lambda (dynamic)."""
  best = (losses + tradeoff * cost[:, None]).argmin(0)
  return jnp.arange(len(losses) - 1)[:, None] >= best


def gate_loss(
  gates: Float[Array, "G B"],
  labels: Bool[Array, "G B"],
  positive: Float[Array, " G"] | float = 1.0,
) -> Float[Array, ""]:
  """Cross-entropy of the gates; `positive` weighs the rows that should go."""
  weight = jnp.asarray(positive, jnp.float32).reshape(-1, 1)
  nats = binary_cross_entropy(gates, labels)
  return (jnp.where(labels, weight, 1) * nats).mean()


def gated_exit(
  l, logits, pooled, memory: Float[Array, " B"], *, gates: Gates, level=0.5
) -> tuple[Bool[Array, " B"], Float[Array, " B"]]:
  """The rule of a `Classifier`; `memory` is 1 - sum P, ones at the start.

  Args:
    level: 1/2; 0 leaves at the first exit, above 1 never (dynamic).
  """
  del pooled
  g = jax.nn.sigmoid(gates(l, logits))
  hazard = jnp.minimum(g, memory) / jnp.maximum(memory, 1e-12)
  return hazard >= level, jnp.maximum(memory - g, 0)
