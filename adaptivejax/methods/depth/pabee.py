# SPDX-License-Identifier: Apache-2.0
r"""PABEE: leave once the answer has stood for a few exits.

Zhou et al., 2020, https://arxiv.org/abs/2006.04152

An exit that agrees with the one before adds one to a counter, another answer
sets it to 0, and the row leaves when the counter reaches the patience t.
Answers agree if they name the same class or, in regression, if no output moved
by `tolerance` or more (eqs. 3 and 4).  All exits are trained at once,

    loss = sum_i i L_i / sum_i i,    i = 1..K                          (eq. 2),

so that later exits, which cost more, weigh more.

Primitive: `patience` in a `depth_loop`.
Departs: nowhere; at K exits a patience of K or more runs all layers.
Axes: K exits, B batch, C classes or outputs.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.halting import Streak, patience


def pabee_loss(losses: Float[Array, "K ..."]) -> Float[Array, ""]:
  """Mean over rows of the losses of all exits, weighted by depth (eq. 2)."""
  weights = jnp.arange(1, losses.shape[0] + 1, dtype=jnp.float32)
  return jnp.tensordot(weights / weights.sum(), losses, 1).mean()


def patient_exit(
  l, logits, pooled, memory: Streak, *, limit: Int[Array, ""] | int
) -> tuple[Bool[Array, " B"], Streak]:
  """The rule of a `Classifier`: leave when `limit` exits in a row agreed.

  Args:
    memory: `Streak.none(B)` at the start.
    limit: t, at least 1; 0 leaves at the first exit (dynamic).
  """
  del l, pooled
  said = jnp.where(jnp.isnan(logits).any(-1), -1, logits.argmax(-1))
  count, memory = patience(said, memory)
  return count >= limit, memory


class Steady(NamedTuple):
  """How long the outputs have stood still."""

  last: Float[Array, "B C"]
  count: Int[Array, " B"]

  @classmethod
  def none(cls, rows: int, outputs: int) -> "Steady":
    """Nothing said yet: far from everything."""
    last = jnp.full((rows, outputs), jnp.inf)
    return cls(last, jnp.zeros(rows, jnp.int32))


def steady_exit(
  l,
  outputs: Float[Array, "B C"],
  pooled,
  memory: Steady,
  *,
  limit: Int[Array, ""] | int,
  tolerance: Float[Array, ""] | float,
) -> tuple[Bool[Array, " B"], Steady]:
  """`patient_exit` for regression: outputs that moved less than `tolerance`."""
  del l, pooled
  moved = jnp.abs(outputs - memory.last).max(-1)
  count = jnp.where(moved < tolerance, memory.count + 1, 0)
  return count >= limit, Steady(outputs, count)
