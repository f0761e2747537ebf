# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: static capacity, unordered slots, positions as data.

A slot is what `pos` says it is, -1 meaning empty; attention reads positions,
so slots need no order.  Empty slots hold zeros: what was never written or is
marked invalid cannot leak.  A full cache overwrites its oldest slots, which
makes it a sliding window.  Layout is head-major, or XLA would copy it in every
loop body.

Axes: L layers, B batch, H key/value heads, S slots, T new tokens, D head width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from adaptivejax.core.attention import Keys


class KVCache(NamedTuple):
  """Keys and values of all layers.

  Attributes:
    k: keys, f[L, B, H, S, D].
    v: values, f[L, B, H, S, D].
    pos: position of the token in each slot, -1 if empty, i32[L, B, S].
    length: tokens seen so far by each row, i32[B]; the next one's position.
  """

  k: Array
  v: Array
  pos: Array
  length: Array

  @classmethod
  def empty(
    cls,
    layers: int,
    batch: int,
    heads: int,
    slots: int,
    width: int,
    dtype: jnp.dtype = jnp.float32,
  ) -> "KVCache":
    """A cache without tokens; all arguments are static."""
    if min(layers, batch, heads, slots, width) < 1:
      raise ValueError(
        f"a cache needs at least one of each: {layers=}, {batch=}, {heads=},"
        f" {slots=}, {width=}."
      )
    data = jnp.zeros((layers, batch, heads, slots, width), dtype)
    pos = jnp.full((layers, batch, slots), -1, jnp.int32)
    return cls(data, data, pos, jnp.zeros(batch, jnp.int32))

  @property
  def slots(self) -> int:
    return self.k.shape[3]

  def positions(self, tokens: int) -> Int[Array, "B T"]:
    """Positions of the next `tokens` (static) tokens of each row."""
    return self.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)

  def advance(self, tokens: int) -> "KVCache":
    """Counts `tokens` (static) as seen, once all layers wrote them."""
    return self._replace(length=self.length + tokens)

  def read(self, layer: Int[Array, ""] | int) -> Keys:
    """Keys, values and positions of one layer."""
    pick = lambda a: lax.dynamic_index_in_dim(a, layer, keepdims=False)
    return Keys(pick(self.k), pick(self.v), pick(self.pos))

  def take(self, layers: Int[Array, " K"]) -> "KVCache":
    """The cache of a model that keeps only these layers (static plan)."""
    keep = lambda a: a[layers]
    return KVCache(keep(self.k), keep(self.v), keep(self.pos), self.length)


def append(
  cache: KVCache,
  layer: Int[Array, ""] | int,
  keys: Keys,
  rows: Bool[Array, " B"] | None = None,
) -> KVCache:
  """Writes the keys of the next T tokens into one layer.

  Args:
    cache: the cache; its `length` does not move, see `KVCache.advance`.
    layer: which layer (dynamic).
    keys: of T tokens; position -1 marks a token this layer has no key for.
    rows: batch rows to write (dynamic); all if not given.

  Raises:
    ValueError: more tokens at once than the cache has slots.
  """
  batch, tokens = keys.pos.shape
  if tokens > cache.slots:
    raise ValueError(
      f"{tokens} tokens do not fit a cache of {cache.slots} slots: make it with"
      f" `slots={tokens}` or more, or feed the prompt in parts."
    )
  slot = cache.positions(tokens) % cache.slots
  if rows is not None:
    slot = jnp.where(rows[:, None], slot, cache.slots)
  row = jnp.arange(batch)[:, None]
  valid = (keys.pos >= 0)[:, None, :, None]
  token_major = lambda a: jnp.moveaxis(jnp.where(valid, a, 0), 2, 1)

  def write(old, new):
    new = token_major(new).astype(old.dtype)
    return old.at[layer, row, :, slot].set(new, mode="drop")

  pos = cache.pos.at[layer, row, slot].set(keys.pos, mode="drop")
  return cache._replace(
    k=write(cache.k, keys.k), v=write(cache.v, keys.v), pos=pos
  )


def kv_propagate(
  cache: KVCache,
  start: Int[Array, " B"],
  fill: Callable[[Int[Array, ""], KVCache], Keys],
) -> KVCache:
  """Gives the layers that a row skipped, from `start[b]` on, their keys.

  Args:
    cache: the cache after the layers that ran.
    start: first skipped layer of each row; L means none.
    fill: `(layer, cache) -> Keys`, the policy: project the exit state through
      the layer's own key and value maps (CALM), `share_from` a computed layer,
      or `leave_empty`.

  Costs a key/value projection per skipped layer, by a loop from the earliest
  start; nothing where no row skipped.
  """

  def body(layer, cache):
    return append(cache, layer, fill(layer, cache), rows=layer >= start)

  return lax.fori_loop(start.min(), cache.k.shape[0], body, cache)


def share_from(start: Int[Array, " B"], tokens: int = 1) -> Callable[..., Keys]:
  """Policy: skipped layers reuse the keys of the last layer that ran."""

  def fill(layer, cache):
    del layer
    row = jnp.arange(start.shape[0])[:, None]
    slot = cache.positions(tokens) % cache.slots
    last = jnp.maximum(start - 1, 0)[:, None]
    heads_first = lambda a: jnp.moveaxis(a[last, row, :, slot], 1, 2)
    pos = cache.pos[last, row, slot]
    return Keys(heads_first(cache.k), heads_first(cache.v), pos)

  return fill


def leave_empty(tokens: int = 1) -> Callable[..., Keys]:
  """Policy: skipped layers have no key for this token (valid-bit)."""

  def fill(layer, cache):
    del layer
    _, batch, heads, _, width = cache.k.shape
    zeros = jnp.zeros((batch, heads, tokens, width), cache.k.dtype)
    return Keys(zeros, zeros, jnp.full((batch, tokens), -1, jnp.int32))

  return fill
