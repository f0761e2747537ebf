# SPDX-License-Identifier: Apache-2.0
"""The key/value cache: static capacity, unordered slots, positions as data.

A slot is what `pos` says it is, -1 meaning empty; attention reads positions,
so slots need no order.  Empty slots hold zeros: what was never written or is
marked invalid cannot leak.  The t-th new token of a row goes to slot `length +
t`; beyond the last slot nothing is written, so a full cache loses no token:
ask `full` first.  A cache that `evicts` is written by `core.eviction`: it gives
up keys for new ones, is never full, and takes no token back.  Rows lead
everywhere, so a row can be taken out, moved or dropped; each layer is
head-major, or XLA would copy it in every loop body.

Axes: B batch, L layers, H key/value heads, S slots, T new tokens, D head width,
P heads that hold different keys: 1 or H.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.quantise import quantise


class Evicts(NamedTuple):
  """Marks a cache that evicts; without leaves, it is part of the structure."""


class KVCache(NamedTuple):
  """Keys and values of all layers.

  Attributes:
    k: keys, f[B, L, H, S, D], or i8.
    v: values, likewise.
    pos: position of the token in each slot, -1 if empty, i32[B, L, P, S].
    length: tokens seen so far by each row, i32[B]; the next one's position.
    tree: while a tree of draft tokens is read: which of these T new tokens each
      of them sees, bool[B, T, T]; else None.
    bias: see `Keys`, f32[B, L, P, S] or None.
    scale: see `Keys`, two f32[B, L, H, S] or None.
    memory: what the layers' looks (`nn.look`) remember, a pytree with leaves
      [B, L, ...], or None.
    evicts: `Evicts()` if keys are given up for new ones, else None.
  """

  k: Array
  v: Array
  pos: Array
  length: Array
  tree: Array | None = None
  bias: Array | None = None
  scale: tuple[Array, Array] | None = None
  memory: Any = None
  evicts: Evicts | None = None

  @classmethod
  def empty(
    cls,
    layers: int,
    batch: int,
    heads: int,
    slots: int,
    width: int,
    dtype: DTypeLike = jnp.float32,
    *,
    per_head: bool = False,
    merges: bool = False,
    evicts: bool = False,
    memory: Any = None,
  ) -> "KVCache":
    """A cache without tokens; all arguments are static but `memory`.

    Args:
      layers, batch, heads, slots, width: L, B, H, S and D.
      dtype: of keys and values; int8 for codes with a scale.
      per_head: heads hold different keys, P = H.
      merges: keys may stand for several, so they have a `bias`.
      evicts: keys are given up for new ones.
      memory: of one layer, with leaves [B, ...]; all start from it.
    """
    if min(layers, batch, heads, slots, width) < 1:
      raise ValueError(
        f"a cache needs at least one of each: {layers=}, {batch=}, {heads=},"
        f" {slots=}, {width=}."
      )
    data = jnp.zeros((batch, layers, heads, slots, width), dtype)
    marks = batch, layers, heads if per_head else 1, slots
    scale = jnp.zeros(data.shape[:-1], jnp.float32)
    codes = jnp.issubdtype(dtype, jnp.integer)
    spread = lambda a: jnp.repeat(a[:, None], layers, axis=1)
    return cls(
      data,
      data,
      jnp.full(marks, -1, jnp.int32),
      jnp.zeros(batch, jnp.int32),
      bias=jnp.zeros(marks, jnp.float32) if merges else None,
      scale=(scale, scale) if codes else None,
      memory=jax.tree.map(spread, memory),
      evicts=Evicts() if evicts else None,
    )

  @property
  def layers(self) -> int:
    return self.k.shape[1]

  @property
  def slots(self) -> int:
    return self.k.shape[3]

  def full(self, tokens: int = 1) -> Bool[Array, " B"]:
    """Rows without room for `tokens` (static) more; none if it `evicts`."""
    if self.evicts is not None:
      return jnp.zeros_like(self.length, bool)
    return self.length + tokens > self.slots

  def positions(self, tokens: int) -> Int[Array, "B T"]:
    """Positions of the next `tokens` (static) tokens of each row."""
    return self.length[:, None] + jnp.arange(tokens, dtype=jnp.int32)

  def advance(self, tokens: Int[Array, " B"] | int) -> "KVCache":
    """Counts `tokens` (dynamic) as seen, once all layers wrote them."""
    return self._replace(length=self.length + tokens)

  def read(self, layer: Int[Array, ""] | int) -> Keys:
    """Keys, values and positions of one layer (dynamic)."""
    held = Keys(self.k, self.v, self.pos, self.bias, self.scale)
    return jax.tree.map(lambda a: _pick(a, layer), held)

  def recollect(self, layer: Int[Array, ""] | int) -> Any:
    """The memory of one layer (dynamic), with leaves [B, ...]."""
    return jax.tree.map(lambda a: _pick(a, layer), self.memory)

  def remember(self, layer: Int[Array, ""] | int, memory: Any) -> "KVCache":
    """With another memory of one layer (dynamic)."""
    put = lambda old, new: old.at[:, layer].set(new.astype(old.dtype))
    return self._replace(memory=jax.tree.map(put, self.memory, memory))

  def take(self, layers: Int[Array, " K"]) -> "KVCache":
    """The cache of a model that keeps only these layers (static plan)."""
    taken = jax.tree.map(
      lambda a: a[:, layers] if a.ndim > 1 else a, self._replace(tree=None)
    )
    return taken


def _pick(a: Array, layer) -> Array:
  return lax.dynamic_index_in_dim(a, layer, axis=1, keepdims=False)


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
    ValueError: more tokens at once than the cache has slots, or a cache that
      evicts.
  """
  _refuse_evicting(cache, "has no slot for each token, so nothing is appended")
  tokens = keys.pos.shape[-1]
  if tokens > cache.slots:
    raise ValueError(
      f"{tokens} tokens do not fit a cache of {cache.slots} slots: make it with"
      f" `slots={tokens}` or more."
    )
  slot = cache.positions(tokens)[:, None]
  if rows is not None:
    slot = jnp.where(rows[:, None, None], slot, cache.slots)
  return write(cache, layer, keys, slot)


def write(
  cache: KVCache,
  layer: Int[Array, ""] | int,
  keys: Keys,
  slot: Int[Array, "B P T"],
) -> KVCache:
  """Writes keys into chosen slots of one layer.

  Args:
    cache: the cache, whose P may be that of `slot` or, if `slot` has P = 1,
      more; so may that of `keys`.
    layer: which layer (dynamic).
    keys: of T tokens; position -1 empties the slot.
    slot: where each goes, or S for nowhere (dynamic); no slot twice.
  """
  if cache.scale is not None:
    keys = coded(keys)
  batch, many, _ = slot.shape
  row = jnp.arange(batch)[:, None]

  def put(old, new):
    """[B, L, X, S, ...] from [B, 1 | X, T, ...]."""
    new = jnp.broadcast_to(new, (batch, old.shape[2], *new.shape[2:]))
    if many == 1:  # token-major: one scatter for all heads
      new = jnp.moveaxis(new, 2, 1).astype(old.dtype)
      return old.at[row, layer, :, slot[:, 0]].set(new, mode="drop")
    head = jnp.arange(old.shape[2])[:, None]
    at = row[..., None], layer, head, slot
    return old.at[at].set(new.astype(old.dtype), mode="drop")

  valid = (keys.pos >= 0)[..., None]
  zeroed = lambda a: jnp.where(valid, a, 0)
  cache = cache._replace(
    k=put(cache.k, zeroed(keys.k)),
    v=put(cache.v, zeroed(keys.v)),
    pos=put(cache.pos, keys.pos),
  )
  if cache.bias is not None:
    new = jnp.zeros_like(keys.pos, jnp.float32)
    bias = put(cache.bias, new if keys.bias is None else keys.bias)
    cache = cache._replace(bias=bias)
  if cache.scale is not None and keys.scale is not None:
    new = [jnp.where(valid[..., 0], a, 0) for a in keys.scale]
    cache = cache._replace(scale=tuple(map(put, cache.scale, new)))
  return cache


def put(cache: KVCache, layer: Int[Array, ""] | int, keys: Keys) -> KVCache:
  """Replaces all S slots of one layer (dynamic), as they are stored."""
  replaced = lambda old, new: old.at[:, layer].set(new.astype(old.dtype))
  held = Keys(cache.k, cache.v, cache.pos, cache.bias, cache.scale)
  held = jax.tree.map(replaced, held, keys)
  return cache._replace(**held._asdict())


def coded(keys: Keys) -> Keys:
  """Keys and values as 8-bit codes with scales; themselves if they are."""
  if keys.scale is not None:
    return keys
  (k, k_scale), (v, v_scale) = quantise(keys.k), quantise(keys.v)
  return keys._replace(k=k, v=v, scale=(k_scale, v_scale))


def crop(cache: KVCache, length: Int[Array, " B"]) -> KVCache:
  """Forgets all tokens from position `length` (dynamic) on.

  Their slots are marked empty; the keys stay where they are, unseen.

  Raises:
    ValueError: the cache evicts; what it gave up for them is gone.
  """
  _refuse_evicting(cache, "takes no token back")
  cut = length[:, None, None, None]
  pos = jnp.where(cache.pos < cut, cache.pos, -1)
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

  Raises:
    ValueError: the cache evicts.
  """
  _refuse_evicting(cache, "takes no token back")
  start = cache.length[:, None]
  row = jnp.arange(nodes.shape[0])[:, None]
  kept = jnp.arange(nodes.shape[1]) < count[:, None]
  source = jnp.minimum(start + nodes, cache.slots - 1)
  target = jnp.where(kept, start + jnp.arange(nodes.shape[1]), cache.slots)

  def move(a):
    """Along the slots of [B, L, P or H, S, ...]."""
    picked = a[row, :, :, source]  # [B, T, L, H, ...]
    return a.at[row, :, :, target].set(picked, mode="drop")

  length = cache.length + count
  stale = jnp.arange(cache.slots) >= length[:, None]
  moved = cache._replace(k=move(cache.k), v=move(cache.v), length=length)
  if cache.bias is not None:
    moved = moved._replace(bias=move(cache.bias))
  if cache.scale is not None:
    moved = moved._replace(scale=tuple(map(move, cache.scale)))
  pos = jnp.where(stale[:, None, None], -1, move(cache.pos))
  return moved._replace(pos=pos)


def _refuse_evicting(cache: KVCache, what: str) -> None:
  if cache.evicts is not None:
    raise ValueError(
      f"the cache of a look that does not keep every key {what}: decode with a"
      " policy that neither drafts nor fills in keys, or with a look that keeps"
      " them all."
    )


def kv_propagate(
  cache: KVCache,
  start: Int[Array, " B"],
  fill: Callable[[Int[Array, ""], KVCache], Keys],
  write: Callable[..., KVCache] = append,
) -> KVCache:
  """Gives the layers that a row skipped, from `start[b]` on, their keys.

  Args:
    cache: the cache after the layers that ran.
    start: first skipped layer of each row; L means none.
    fill: `(layer, cache) -> Keys`, the policy: project the exit state through
      the layer's own key and value maps (CALM), `share_from` a computed layer,
      or `leave_empty`.
    write: as `append`, for keys that something else depends on.

  Costs a key/value projection per skipped layer, by a loop from the earliest
  start; nothing where no row skipped.
  """

  def body(layer, cache):
    return write(cache, layer, fill(layer, cache), rows=layer >= start)

  return lax.fori_loop(start.min(), cache.layers, body, cache)


def share_from(start: Int[Array, " B"], tokens: int = 1) -> Callable[..., Keys]:
  """Policy: skipped layers reuse the keys of the last layer that ran."""

  def fill(layer, cache):
    del layer
    row = jnp.arange(start.shape[0])[:, None]
    slot = jnp.minimum(cache.positions(tokens), cache.slots - 1)
    last = jnp.maximum(start - 1, 0)[:, None]
    heads_first = lambda a: jnp.moveaxis(a[row, last, :, slot], 1, 2)
    k, v, pos = map(heads_first, (cache.k, cache.v, cache.pos))
    return Keys(k, v, pos, scale=jax.tree.map(heads_first, cache.scale))

  return fill


def leave_empty(tokens: int = 1) -> Callable[..., Keys]:
  """Policy: skipped layers have no key for this token (valid-bit)."""

  def fill(layer, cache):
    del layer
    batch, _, heads, _, width = cache.k.shape
    zeros = jnp.zeros((batch, heads, tokens, width), cache.k.dtype)
    pos = jnp.full((batch, 1, tokens), -1, jnp.int32)
    scale = jax.tree.map(lambda a: zeros[..., 0].astype(a.dtype), cache.scale)
    return Keys(zeros, zeros, pos, scale=scale)

  return fill
