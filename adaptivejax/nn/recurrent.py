# SPDX-License-Identifier: Apache-2.0
"""Looks that remember a state of fixed size instead of keys.

Axes: B batch, T tokens, D features, H query heads, W head width.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.cost import Cost, flops
from adaptivejax.core.linear_attention import attend_linear
from adaptivejax.nn.look import Look, Looked


class Recurrent(Look):
  """Linear attention: its memory is the state, the cache one empty slot.

  A subclass says how much is forgotten, and may change what goes into the state
  and what comes out.  A token that is not live leaves the state as it is.

  Args:
    heads: H.
    chunk: tokens of a chunk in training and prefill (static).
  """

  rotated = False
  evicts = True

  def __init__(self, heads: int, *, chunk: int = 64):
    if chunk < 1 or chunk % 16:
      raise ValueError(f"{chunk=} must be a positive multiple of 16 tokens.")
    self.heads, self.chunk = heads, chunk

  def log_decay(self, layer: Int[Array, ""] | int) -> Float[Array, "1 H 1"]:
    """Of each head, at a layer (dynamic); 0 forgets nothing."""
    del layer
    return jnp.zeros((1, self.heads, 1), jnp.float32)

  def before(self, a: Float[Array, "..."]) -> Float[Array, "..."]:
    """What becomes of queries, keys and values."""
    return a

  def after(
    self, mixed: Float[Array, "B T D"], x: Float[Array, "B T D"]
  ) -> Float[Array, "B T D"]:
    """What becomes of the result, given what the attention was given."""
    del x
    return mixed

  def slots(self, slots: int) -> int:
    return 1

  def memory(self, batch, heads, slots, width, dtype):
    return jnp.zeros((batch, self.heads, width, width), jnp.float32)

  def __call__(
    self, q, keys, positions, layer=0, *, x=None, live=None, mask=None, key=None
  ) -> Looked:
    _refuse(self, mask)
    return self._look(q, keys, positions, layer, x, live, None)[0]

  def step(
    self, q, keys, positions, cache, layer=0, *, x=None, live=None, key=None
  ):
    _refuse(self, cache.tree)
    state = cache.recollect(layer)
    looked, state = self._look(q, keys, positions, layer, x, live, state)
    return looked, cache.remember(layer, state)

  def _look(
    self, q, keys: Keys, positions, layer, x, live, state
  ) -> tuple[Looked, Float[Array, "B H W W"]]:
    if x is None or q.shape[2] != self.heads:
      raise ValueError(
        f"a look of {self.heads=} needs queries of as many heads, and `x`; got"
        f" {q.shape[2]} heads and x={None if x is None else x.shape}."
      )
    x = jnp.where(positions[..., None] >= 0, x, 0)
    mixed, state = attend_linear(
      self.before(q),
      keys._replace(k=self.before(keys.k), v=self.before(keys.v)),
      self.log_decay(layer),
      state,
      chunk=self.chunk,
      everyone=state is None and live is None,
    )
    mixed = mixed.reshape(x.shape)
    out = self.after(mixed, x).reshape(q.shape)
    # Pairs of a chunk and the state, for all tokens: its own dense twin.
    pairs = 0 if q.shape[1] == 1 else min(self.chunk, q.shape[1])
    work = 4.0 * q.size * (pairs + q.shape[3]) + flops(self.after, mixed, x)
    cost = Cost.dense(work, q.shape[0] * q.shape[1])
    if live is not None:
      cost = cost._replace(items=live.sum(dtype=jnp.float32))
    return Looked(out, cost), state


def _refuse(look: Look, mask) -> None:
  if mask is not None:
    raise ValueError(
      f"{type(look).__name__} has no scores for a mask or a tree of drafts to"
      " hide: its state is that of one text. Decode without drafts; mark tokens"
      " that are not there with position -1."
    )
