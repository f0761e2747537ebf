# SPDX-License-Identifier: Apache-2.0
"""Attention over lists of key blocks, priced: sparse, and its dense twin.

Axes: B batch, T queries, S keys, H query heads, G key heads, P key heads that
own marks (1 or G), D head width, Q query tiles, C entries of a list.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.attention import Keys, attend, dequantised
from adaptivejax.core.block_lists import listed_blocks, lists_from_mask
from adaptivejax.core.block_masks import BLOCK, visible_blocks
from adaptivejax.core.cost import Cost
from adaptivejax.core.per_head import over_heads
from adaptivejax.core.ring import ring_attention
from pallas_kernels.block_sparse_attention import (
  Attended,
  BlockLists,
  Marks,
  Rule,
  block_sparse_attention,
  reference,
)


def attend_blocks(
  q: Float[Array, "B T H D"],
  keys: Keys,
  lists: BlockLists,
  positions: Int[Array, "B T"],
  *,
  window: int | None = None,
  segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
  bias: Float[Array, "B P S"] | None = None,
  sinks: Float[Array, " H"] | None = None,
  softcap: float | None = None,
  scale: float | None = None,
  causal: bool = True,
  mass: bool = False,
  axis: str | None = None,
) -> tuple[Attended, Cost]:
  """Softmax attention of each query tile over its listed key blocks.

  A pair counts where its block is listed and its positions (and segments) let
  it.  A key is as if it were not there for a query that does not see it, NaN
  included; a query that sees a key or value that is not finite gets NaN, and no
  gradient flows through it, as in `attend`.

  Args:
    q: queries.
    keys: keys and values, in any order; `pos` -1 is no key.
    lists: which blocks each tile looks at (dynamic), see `core.block_lists`.
    positions: of the queries; -1 sees nothing.
    window: how many positions a query sees, its own included (static).
    segments: of queries and keys; pairs must agree.
    bias: added to the scores of a key, as `keys.bias` is; differentiable.
    sinks: score of a key of value 0 that each head sees; differentiable.
    softcap: scores s become softcap * tanh(s / softcap) (static).
    scale: of the scores; 1 / sqrt(D) if not given (static).
    causal: a query sees positions up to its own (static).
    mass: return the attention that each listed block got (static); under an
      ambient mesh it brings the keys of a sequence together.
    axis: inside `jax.shard_map`, mesh axis over which the sequence is split;
      `lists` are of this device's tiles, and name blocks of the whole (static).
      Under an ambient mesh all this is done for you (`core.per_head`).

  Returns:
    `(attended, cost)`: `out` f[B, T, H, D], `lse` f32[B, T, H], differentiable
    both, and `mass` f32[B, H, Q, C] or None.  A query that sees nothing has
    `out` 0 and `lse` -inf.  The cost counts listed blocks.

  Raises:
    ValueError: shapes do not fit together, or a mesh axis does not divide them.
  """
  arrays, marks, rule = _arguments(
    q, keys, positions, window, segments, bias, sinks, softcap, scale, causal
  )
  if axis is not None and mass:
    raise ValueError("`mass` needs all keys at once: leave `axis` out.")

  def attend(q, k, v, lists, marks, axis):
    if axis is not None:
      return ring_attention(q, k, v, lists, marks, rule, axis=axis)
    return block_sparse_attention(q, k, v, lists, marks, rule, mass=mass)

  if axis is None:
    sizes = {"tile": lists.block_q, "block": lists.block_kv}
    found = over_heads(attend, *arrays, lists, marks, **sizes, ring=not mass)
  else:
    found = attend(*arrays, lists, marks, axis=axis)
  shards = 1 if axis is None else lax.axis_size(axis)
  return _time_major(found), block_cost(q, keys, lists, shards)


def attend_visible(
  q: Float[Array, "B T H D"],
  keys: Keys,
  positions: Int[Array, "B T"],
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
) -> tuple[Float[Array, "B T H E"], Cost]:
  """Causal attention to all keys by blocks: those of the future are left out.

  `attend`, whose arguments these are, without its scores of all pairs; what
  fewer queries than a tile ask is left to it.  The items of the cost are
  queries.
  """
  full = 2.0 * q.size * keys.k.shape[2] * (1 + keys.v.shape[-1] / q.shape[-1])
  dense = Cost.dense(full, q.shape[0] * q.shape[1])
  if q.shape[1] < block_q:
    return attend(q, keys, positions), dense
  sizes = {"block_q": block_q, "block_kv": block_kv}
  lists = lists_from_mask(visible_blocks(positions, keys.pos, **sizes), **sizes)
  found, cost = attend_blocks(q, keys, lists, positions)
  return found.out, dense._replace(spent=jnp.minimum(cost.spent, full))


def attend_blocks_dense(
  q: Float[Array, "B T H D"],
  keys: Keys,
  lists: BlockLists,
  positions: Int[Array, "B T"],
  *,
  window: int | None = None,
  segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
  bias: Float[Array, "B P S"] | None = None,
  sinks: Float[Array, " H"] | None = None,
  softcap: float | None = None,
  scale: float | None = None,
  causal: bool = True,
  mass: bool = False,
  axis: str | None = None,
) -> tuple[Attended, Cost]:
  """The dense twin of `attend_blocks`: all pairs, then a mask of them.

  Raises:
    ValueError: as there, or `axis` is given: it has no ring.
  """
  if axis is not None:
    raise ValueError("the dense twin wants the whole sequence: no `axis`.")
  arrays, marks, rule = _arguments(
    q, keys, positions, window, segments, bias, sinks, softcap, scale, causal
  )
  found = reference.block_sparse_attention(
    *arrays, lists, marks, rule, mass=mass
  )
  return _time_major(found), block_cost(q, keys, lists)


def block_cost(
  q: Float[Array, "B T H D"], keys: Keys, lists: BlockLists, shards: int = 1
) -> Cost:
  """FLOPs of the two products over the listed blocks; items are blocks.

  A tile or block that is cut off counts its part.  The keys may be one of so
  many `shards` (static).
  """
  batch, tokens, heads, width = q.shape
  size = shards * keys.k.shape[2]
  index, count = lists.index, listed_blocks(lists)
  valid = jnp.arange(index.shape[-1]) < count[..., None]
  length = jnp.clip(size - index * lists.block_kv, 0, lists.block_kv)
  start = jnp.arange(index.shape[2]) * lists.block_q
  rows = jnp.clip(tokens - start, 0, lists.block_q)
  pairs = jnp.where(valid, length, 0).sum(-1) * rows.astype(jnp.float32)
  copies = batch * heads // (index.shape[0] * index.shape[1])
  flops = 2.0 * (width + keys.v.shape[-1])
  spent = flops * copies * pairs.sum()
  full = jnp.full_like(spent, flops * batch * heads * tokens * size)
  items = copies * count.sum(dtype=jnp.float32)
  most = min(index.shape[-1] * lists.block_kv, size)
  bound = jnp.float32(flops * batch * heads * tokens * most)
  return Cost(spent, full, items, items, jnp.zeros_like(spent), bound)


def _arguments(
  q, keys, positions, window, segments, bias, sinks, softcap, scale, causal
):
  """Head-major arrays, marks and rule."""
  keys = dequantised(keys, q.dtype)
  if keys.bias is not None:
    bias = keys.bias if bias is None else bias + keys.bias
  of_query, of_key = segments if segments is not None else (None, None)
  marks = Marks(positions, keys.pos, of_query, of_key, bias, sinks)
  rule = Rule(causal=causal, window=window, scale=scale, softcap=softcap)
  return (jnp.swapaxes(q, 1, 2), keys.k, keys.v), marks, rule


def _time_major(found: Attended) -> Attended:
  out, lse, mass = found
  return Attended(jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2), mass)
