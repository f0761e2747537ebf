# SPDX-License-Identifier: Apache-2.0
"""Giving keys up: which ones go, what takes their slots, what they merge into.

Attention reads positions, not slots, so giving up a key for a new one is one
overwrite: `replace_victim`.  After many tokens at once, `evict` gathers what is
kept into the slots there are.  Both break ties by index, the lower one first.

Axes: B batch, L layers, G key heads, P heads that keep different keys (1 or G),
N candidates, S slots, T new tokens, C classes, D head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys, dequantised
from adaptivejax.core.cache import KVCache, coded, write

UNWANTED = -jnp.inf
"""Priority of what is not to be kept, whatever room there is."""


def victim(
  pos: Int[Array, "B P S"],
  score: Float[Array, "B P S"] | Int[Array, "B P S"],
  protected: Bool[Array, "B P S"] | None = None,
) -> Int[Array, "B P"]:
  """The slot to write next: an empty one, else that of the lowest score.

  Protected slots are taken only where no other is left.
  """
  score = score.astype(jnp.float32)
  if protected is not None:
    score = jnp.where(protected, jnp.inf, score)
  return jnp.where(pos < 0, UNWANTED, score).argmin(-1).astype(jnp.int32)


def replace_victim(
  cache: KVCache,
  layer: Int[Array, ""] | int,
  keys: Keys,
  score: Float[Array, "B P S"] | Int[Array, "B P S"],
  protected: Bool[Array, "B P S"] | None = None,
) -> tuple[KVCache, Int[Array, "B P"]]:
  """Writes one token per row over the key that is worth least.

  Args:
    cache: the cache.
    layer: which layer (dynamic).
    keys: of T = 1 token; where its position is -1, nothing is written.
    score: what each slot is worth.
    protected: slots that stay, see `victim`; none if not given.

  Returns:
    The cache and the slot that was written, S where none was.
  """
  pos = cache.read(layer).pos
  slot = victim(pos, score, protected)
  slot = jnp.where(keys.pos[..., 0] >= 0, slot, cache.slots)
  return write(cache, layer, keys, slot[..., None]), slot


def candidates(held: Keys, keys: Keys) -> Keys:
  """What a layer holds, and T new keys after it, as the cache stores keys."""
  if held.scale is not None:
    keys = coded(keys)
  pos = jnp.repeat(keys.pos, held.pos.shape[1] // keys.pos.shape[1], axis=1)
  bias = None
  if held.bias is not None:
    bias = jnp.zeros_like(pos, jnp.float32) if keys.bias is None else keys.bias
  keys = keys._replace(pos=pos, bias=bias)
  join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], 2)
  return jax.tree.map(join, held, keys)


def best(
  priority: Float[Array, "B P N"],
  count: Int[Array, "..."] | int,
  slots: int,
) -> Int[Array, "B P S"]:
  """Indices of the `count` highest priorities, rising; N in slots left over.

  Args:
    priority: `UNWANTED` for what is not to be kept.
    count: to keep, of each row or of all (dynamic).
    slots: S, the most that can be kept (static).
  """
  many = priority.shape[-1]
  top, index = jax.lax.top_k(priority, min(slots, many))
  count = jnp.reshape(count, (-1, 1, 1))
  fits = (jnp.arange(index.shape[-1]) < count) & (top > UNWANTED)
  index = jnp.sort(jnp.where(fits, index, many), axis=-1)
  spare = (0, 0), (0, 0), (0, slots - index.shape[-1])
  return jnp.pad(index, spare, constant_values=many)


def gather(
  a: Array, index: Int[Array, "B P S"], empty: float | int = 0
) -> Array:
  """Entries of `a`, [B, P or G, N, ...], by `best`; `empty` in empty slots."""
  index = index.reshape(*index.shape, *[1] * (a.ndim - 3))
  return jnp.take_along_axis(a, index, 2, mode="fill", fill_value=empty)


def evict(keys: Keys, index: Int[Array, "B P S"]) -> Keys:
  """The keys that stay, in S slots; `index` is that of `best`."""
  kept = jax.tree.map(lambda a: gather(a, index), keys)
  return kept._replace(pos=gather(keys.pos, index, -1))


def merge(
  keys: Keys,
  classes: Int[Array, "B G N"],
  count: int,
  *,
  weight: Float[Array, "B G N"] | None = None,
  log_size: bool = True,
  keep_norm: bool = False,
) -> Keys:
  """One key for each class: the weighted mean of its members.

  Args:
    keys: with or without a `bias`, the log of the size of each.
    classes: in 0..count-1; another one, such as -1, gives the key up.
    count: classes, S of the result (static); those without members are empty.
    weight: of each key in its class, not negative; its size if not given.
    log_size: the sizes of a class add up in its bias, so that attention counts
      it as its members: equal keys merge exactly.  Else all weigh as one.
    keep_norm: keys get the mean norm of the members; a mean's is smaller.

  Returns:
    Keys whose position is the last one of the class.
  """
  keys = dequantised(keys, jnp.float32) if keys.scale is not None else keys
  batch, groups = classes.shape[:2]
  wide = lambda a: jnp.broadcast_to(a, (batch, groups, a.shape[2]))
  pos = wide(keys.pos)
  member = (pos >= 0) & (classes >= 0) & (classes < count)
  size = jnp.ones_like(pos, jnp.float32)
  if keys.bias is not None:
    size = wide(jnp.exp(keys.bias))
  size = jnp.where(member, size, 0)
  weight = size if weight is None else jnp.where(member, weight, 0)
  home = jnp.where(member, classes, count)

  def total(a, home):
    return jax.ops.segment_sum(a, home, count)

  total = jax.vmap(jax.vmap(total))
  mass = total(weight, home)[..., None]
  safe = jnp.where(mass > 0, mass, 1)

  def mean(a):
    a = jnp.where(member[..., None], a.astype(jnp.float32), 0)
    return total(weight[..., None] * a, home) / safe

  k, v = mean(keys.k), mean(keys.v)
  if keep_norm:
    norm = lambda a: jnp.linalg.norm(a, axis=-1, keepdims=True)
    length = norm(k)
    k = k * mean(norm(keys.k)) / jnp.where(length > 0, length, 1)
  last = jax.vmap(jax.vmap(lambda a, i: jax.ops.segment_max(a, i, count)))
  pos = jnp.maximum(last(jnp.where(member, pos, -1), home), -1)
  bias = None
  if log_size:
    size = total(size, home)
    bias = jnp.where(size > 0, jnp.log(jnp.where(size > 0, size, 1)), 0)
  as_given = lambda new, old: new.astype(old.dtype)
  return Keys(as_given(k, keys.k), as_given(v, keys.v), pos, bias)


def compacted_positions(pos: Int[Array, "B P S"]) -> Int[Array, "B P S"]:
  """The rank of each position among those kept, -1 in empty slots."""
  order = jnp.argsort(jnp.where(pos < 0, jnp.iinfo(pos.dtype).max, pos))
  rank = jnp.argsort(order).astype(pos.dtype)
  return jnp.where(pos < 0, -1, rank)
