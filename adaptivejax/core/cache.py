# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: static capacity, unordered slots, positions as data.

A slot is what `pos` says it is, -1 meaning empty; attention reads positions,
so slots need no order.  Empty slots hold zeros: what was never written or is
marked invalid cannot leak.  The t-th new token of a row goes to slot `length +
t`; beyond the last slot nothing is written, so a full cache loses no token:
ask `full` first.  Rows lead everywhere, so a row can be taken out, moved or
dropped; each layer is head-major, or XLA would copy it in every loop body.

Axes: B batch, L layers, H key/value heads, S slots, T new tokens, D head width.
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
    k: keys, f[B, L, H, S, D].
    v: values, f[B, L, H, S, D].
    pos: position of the token in each slot, -1 if empty, i32[B, L, S].
    length: tokens seen so far by each row, i32[B]; the next one's position.
    tree: while a tree of draft tokens is read: which of these T new tokens each
      of them sees, bool[B, T, T]; else None.
  """

  k: Array
  v: Array
  pos: Array
  length: Array
  tree: Array | None = None

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
    data = jnp.zeros((batch, layers, heads, slots, width), dtype)
    pos = jnp.full((batch, layers, slots), -1, jnp.int32)
    return cls(data, data, pos, jnp.zeros(batch, jnp.int32))

  @property
  def layers(self) -> int:
    return self.k.shape[1]

  @property
  def slots(self) -> int:
    return self.k.shape[3]

  def full(self, tokens: int = 1) -> Bool[Array, " B"]:
    """Rows without room for `tokens` (static) more."""
    return self.length + tokens > self.slots

  def positions(self, tokens: int) -> Int[Array, "B T"]:
    """Positions of the next `tokens` (static) tokens of each row."""
    return self.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)

  def advance(self, tokens: Int[Array, " B"] | int) -> "KVCache":
    """Counts `tokens` (dynamic) as seen, once all layers wrote them."""
    return self._replace(length=self.length + tokens)

  def read(self, layer: Int[Array, ""] | int) -> Keys:
    """Keys, values and positions of one layer (dynamic)."""
    pick = lambda a: lax.dynamic_index_in_dim(a, layer, axis=1, keepdims=False)
    return Keys(pick(self.k), pick(self.v), pick(self.pos))

  def take(self, layers: Int[Array, " K"]) -> "KVCache":
    """The cache of a model that keeps only these layers (static plan)."""
    keep = lambda a: a[:, layers]
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
      f" `slots={tokens}` or more."
    )
  slot = cache.positions(tokens)
  if rows is not None:
    slot = jnp.where(rows[:, None], slot, cache.slots)
  row = jnp.arange(batch)[:, None]
  valid = (keys.pos >= 0)[:, None, :, None]
  token_major = lambda a: jnp.moveaxis(jnp.where(valid, a, 0), 2, 1)

  def write(old, new):
    new = token_major(new).astype(old.dtype)
    return old.at[row, layer, :, slot].set(new, mode="drop")

  pos = cache.pos.at[row, layer, slot].set(keys.pos, mode="drop")
  return cache._replace(
    k=write(cache.k, keys.k), v=write(cache.v, keys.v), pos=pos
  )


def crop(cache: KVCache, length: Int[Array, " B"]) -> KVCache:
  """Forgets all tokens from position `length` (dynamic) on.

  Their slots are marked empty; the keys stay where they are, unseen.
  """
  pos = jnp.where(cache.pos < length[:, None, None], cache.pos, -1)
  return cache._replace(pos=pos, length=length)


def commit_path(
  cache: KVCache,
  nodes: Int[Array, "B T"],
  count: Int[Array, " B"],
) -> KVCache:
  """Keeps the accepted path of a tree whose nodes were written as new tokens.

  Args:
    cache: `length` not advanced since the tree was written; node n of it lies
      in slot `length + n`.
    nodes: the path, from the root.
    count: nodes to keep (dynamic).

  Returns:
    The cache in which the path's nodes are the next `count` tokens, in order,
    and the tree's other nodes are forgotten.
  """
  start = cache.length[:, None]
  row = jnp.arange(nodes.shape[0])[:, None]
  kept = jnp.arange(nodes.shape[1]) < count[:, None]
  source = jnp.minimum(start + nodes, cache.slots - 1)
  target = jnp.where(kept, start + jnp.arange(nodes.shape[1]), cache.slots)

  def move(a):
    picked = a[row, :, :, source]  # [B, T, L, H, D]
    return a.at[row, :, :, target].set(picked, mode="drop")

  pos = cache.pos[row, :, source]
  moved = cache._replace(
    k=move(cache.k),
    v=move(cache.v),
    pos=cache.pos.at[row, :, target].set(pos, mode="drop"),
  )
  length = cache.length + count
  stale = jnp.arange(cache.slots) >= length[:, None]
  pos = jnp.where(stale[:, None], -1, moved.pos)
  return moved._replace(pos=pos, length=length)


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

  return lax.fori_loop(start.min(), cache.layers, body, cache)


def share_from(start: Int[Array, " B"], tokens: int = 1) -> Callable[..., Keys]:
  """Policy: skipped layers reuse the keys of the last layer that ran."""

  def fill(layer, cache):
    del layer
    row = jnp.arange(start.shape[0])[:, None]
    slot = jnp.minimum(cache.positions(tokens), cache.slots - 1)
    last = jnp.maximum(start - 1, 0)[:, None]
    heads_first = lambda a: jnp.moveaxis(a[row, last, :, slot], 1, 2)
    pos = cache.pos[row, last, slot]
    return Keys(heads_first(cache.k), heads_first(cache.v), pos)

  return fill


def leave_empty(tokens: int = 1) -> Callable[..., Keys]:
  """Policy: skipped layers have no key for this token (valid-bit)."""

  def fill(layer, cache):
    del layer
    batch, _, heads, _, width = cache.k.shape
    zeros = jnp.zeros((batch, heads, tokens, width), cache.k.dtype)
    return Keys(zeros, zeros, jnp.full((batch, tokens), -1, jnp.int32))

  return fill
