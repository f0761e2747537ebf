# SPDX-License-Identifier: Apache-2.0
"""Where the listed keys of a cache lie, and which of them are seen.

Axes: B batch, H query heads, G key heads, L heads that own a list, T queries,
K entries of a list, M pieces, g slots of a piece, S slots of a cache, N pages
of a pool.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.types import Marks, Rule
from pallas_kernels.sparse_decode_attention.types import Units


class Pieces(NamedTuple):
  """Runs of g slots that lie side by side.

  Attributes:
    lead: row of the cache, or page of the pool, i32[B, L, M].
    start: first slot in there, i32[B, L, M].
    slot: which slots of the sequence these are, i32[B, L, M, g].
    live: whether a slot is listed, and by no other piece, bool[B, L, M, g].
  """

  lead: jax.Array
  start: jax.Array
  slot: jax.Array
  live: jax.Array


def length(k: Any, page_table: Any) -> int:
  """Slots of a sequence, S."""
  return k.shape[2] * (1 if page_table is None else page_table.shape[1])


def everything(k: jax.Array, page_table: jax.Array | None, most: int) -> Units:
  """All of a cache, in pages of the pool or units of up to `most` slots."""
  slots = length(k, page_table)
  unit = min(most, slots) if page_table is None else k.shape[2]
  count = -(-slots // unit)
  index = jnp.arange(count, dtype=jnp.int32)[None, None]
  return Units(index, jnp.full((1, 1), count, jnp.int32), unit)


def locate(
  units: Units, k: jax.Array, page_table: jax.Array | None, batch: int
) -> Pieces:
  """The pieces of each list.

  In a pool, a unit is a part of a page or whole pages (`ops` checks); in a
  contiguous cache a piece that would end past the last slot starts earlier.
  """
  slots, page = length(k, page_table), k.shape[2]
  entry = jnp.arange(units.index.shape[2])
  valid = entry < units.count[..., None]  # [B, L, K]
  size = min(units.unit, page)
  first = units.index[..., None] * units.unit
  first = first + jnp.arange(0, units.unit, size)[: -(-slots // size)]
  valid = jnp.broadcast_to(valid[..., None], first.shape)
  wide = (batch, first.shape[1], first.shape[2] * first.shape[3])
  flat = lambda a: jnp.broadcast_to(a.reshape(-1, *wide[1:]), wide)
  first, valid = flat(first), flat(valid)
  valid &= (first >= 0) & (first < slots)
  begin = jnp.clip(first, 0, slots - size)
  if page_table is None:
    lead = jnp.broadcast_to(jnp.arange(batch)[:, None, None], wide)
    start = begin
  else:
    flat_pages = (begin // page).reshape(batch, -1)
    lead = jnp.take_along_axis(
      jnp.broadcast_to(page_table, (batch, page_table.shape[1])), flat_pages, 1
    ).reshape(wide)
    start = begin % page
    valid &= lead >= 0
    lead = jnp.maximum(lead, 0)
  slot = begin[..., None] + jnp.arange(size)
  live = valid[..., None] & (slot >= first[..., None])
  return Pieces(lead, start, slot, live)


def read(a: jax.Array, pieces: Pieces, heads: int) -> jax.Array:
  """What `a` holds there, [B, heads, M * g, *rest].

  Args:
    a: [B, G, S, *rest], or [N, G, page, *rest] of a pool.
    pieces: where.
    heads: how many lists there are to be: G, or H where query heads have lists.
  """
  (batch, _, count, size), rest = pieces.slot.shape, a.shape[3:]
  head = jnp.arange(heads)[:, None] // (heads // a.shape[1])
  at = jnp.broadcast_arrays(pieces.lead, head, pieces.start)
  where = lax.GatherDimensionNumbers(
    offset_dims=tuple(range(3, 4 + len(rest))),
    collapsed_slice_dims=(0, 1),
    start_index_map=(0, 1, 2),
  )
  got = lax.gather(
    a, jnp.stack(at, -1), where, (1, 1, size, *rest), mode="clip"
  )
  return got.reshape(batch, heads, count * size, *rest)


def seen(
  pieces: Pieces, marks: Marks, rule: Rule, queries: int, slots: int
) -> tuple[jax.Array, jax.Array | None]:
  """Which query sees which slot of the pieces, and the bias of its score.

  Returns:
    bool[B, O, T, M * g] and f32[B, O, M * g] or None; O is 1 where all heads
    have the same, else the heads of `read`.
  """
  batch, lists = pieces.slot.shape[:2]
  slot = pieces.slot.reshape(batch, lists, -1)
  take = lambda mark: _at(mark, slot)
  pos = slot if marks.kv_pos is None else take(marks.kv_pos)
  q_pos = marks.q_pos
  if q_pos is None:
    q_pos = jnp.arange(slots - queries, slots)[None]
  at, pos = q_pos[:, None, :, None], pos[:, :, None]
  visible = pieces.live.reshape(batch, lists, 1, -1) & (at >= 0) & (pos >= 0)
  if rule.causal:
    visible &= pos <= at
  if rule.window is not None:
    visible &= pos > at - rule.window
  if marks.q_segment is not None and marks.kv_segment is not None:
    segment = take(marks.kv_segment[:, None])[:, :, None]
    visible &= segment == marks.q_segment[:, None, :, None]
  bias = None if marks.kv_bias is None else take(marks.kv_bias)
  return visible, bias


def _at(mark: jax.Array, slot: jax.Array) -> jax.Array:
  """`mark` [B, P, S] at the slots [B, L, n], [B, max(P, L), n]."""
  heads = max(mark.shape[1], slot.shape[1])
  each = lambda a: jnp.repeat(a, heads // a.shape[1], axis=1)
  mark = jnp.broadcast_to(mark, (slot.shape[0], *mark.shape[1:]))
  return jnp.take_along_axis(each(mark), each(slot), axis=2)
