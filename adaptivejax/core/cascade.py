# SPDX-License-Identifier: Apache-2.0
"""Cascades: what a layer prunes stays pruned in the layers after it.

Axes: B batch, T tokens, S slots, N items, H query heads, G key heads, W head
width.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention_mass import group_reduce
from adaptivejax.core.select import top_k


class Cascade(NamedTuple):
  """What the layers so far found.

  Attributes:
    tokens: importance of each slot's token, f32[B, S].
    heads: importance of each key head, f32[B, G].
    no_token: slots that are pruned, bool[B, S].
    no_head: key heads that are pruned, bool[B, G].
    begun: tokens before those that these layers read, i32[B]; -1 before any.
  """

  tokens: Array
  heads: Array
  no_token: Array
  no_head: Array
  begun: Array

  @classmethod
  def empty(cls, batch: int, slots: int, heads: int) -> "Cascade":
    """Before any layer; all arguments are static."""
    slot, head = jnp.zeros((batch, slots)), jnp.zeros((batch, heads))
    begun = jnp.full(batch, -1, jnp.int32)
    return cls(slot, head, slot > 0, head > 0, begun)

  def begin(self, length: Int[Array, " B"]) -> "Cascade":
    """With all back, in rows whose tokens are others than before.

    Args:
      length: tokens before those that are read now.
    """
    same = (self.begun == length)[:, None]
    return self._replace(
      no_token=self.no_token & same, no_head=self.no_head & same, begun=length
    )

  def observe(
    self, out: Float[Array, "B T H W"], mass: Float[Array, "B H S"]
  ) -> "Cascade":
    """With what a layer found: sizes of outputs, attention of keys."""
    size = jnp.abs(out.astype(jnp.float32)).sum((1, 3))
    heads = self.heads + group_reduce(size, self.heads.shape[1], "sum")
    return self._replace(tokens=self.tokens + mass.sum(1), heads=heads)

  def prune(
    self,
    there: Bool[Array, "B S"],
    stay: Bool[Array, "B S"],
    tokens: Float[Array, ""],
    heads: Float[Array, ""],
  ) -> "Cascade":
    """Without the least important of what is left.

    Args:
      there: slots with a token, the others are left alone.
      stay: slots that stay whatever they are worth and the share is.
      tokens, heads: shares to give up (dynamic); a head at least stays.
    """
    left = there & ~self.no_token
    worth = jnp.where(stay, jnp.inf, self.tokens)
    gone = left & ~most_important(worth, left, tokens, (stay & left).sum(-1))
    kept = most_important(self.heads, ~self.no_head, heads, 1)
    return self._replace(no_token=self.no_token | gone, no_head=~kept)

  def only_in(self, rows: Bool[Array, " B"], old: "Cascade") -> "Cascade":
    """As `old` in all rows but these."""
    row = lambda a: rows.reshape(-1, *[1] * (a.ndim - 1))
    return Cascade(*(jnp.where(row(a), a, b) for a, b in zip(self, old)))


def most_important(
  worth: Float[Array, "B N"],
  left: Bool[Array, "B N"],
  share: Float[Array, ""] | float,
  least: Int[Array, " B"] | int,
) -> Bool[Array, "B N"]:
  """Of those left all but a share (dynamic), or `least`; ties by index."""
  keep = jnp.round(left.sum(-1) * (1 - share)).astype(jnp.int32)
  return (
    top_k(jnp.where(left, worth, -jnp.inf), jnp.maximum(keep, least)) & left
  )
