# SPDX-License-Identifier: Apache-2.0
"""The lists as the TPU kernels read them.

A *row* is a query tile of a list head; its entries are sorted: first the blocks
of which every pair is visible, which need no mask, then those with a mask; what
no query of the tile sees is left out.  All of that is found here, of the least
and the greatest position of each tile and block.

Scalar memory holds a row as a header, (unmasked entries, all entries), and its
blocks, two 16-bit numbers in a word.

Axes: as in `cuts`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.cuts import Cut
from pallas_kernels.block_sparse_attention.types import BlockLists, Marks, Rule

LOG2E = math.log2(math.e)
BEYOND = 1 << 30
"""A position after all others: that of a key which is none."""
FLOOR = -0.5e30
"""Where running maxima begin: above the scores of invisible keys."""
MARKS = 8
"""Rows of marks: what a register has at least."""


class Rows(NamedTuple):
  """The lists as the kernels read them, in `parts` x rows.

  Attributes:
    words: i32[B', L', Q, words].
    order: the entry of the lists in each place of a row, i32[B', L', Q, C].
    bits: which queries look at the entries: bit n of word w is entry
      32 w + n, i32[B', L', Q, W, N]; None if all.
  """

  words: jax.Array
  order: jax.Array
  bits: jax.Array | None


class Entries(NamedTuple):
  """The entries of each row, sorted.

  Attributes:
    block: key blocks; past `total`, the last one again, i32[B', L', Q, C].
    order: the entry of the lists in each place, i32[B', L', Q, C].
    unmasked: how many need no mask, i32[B', L', Q].
    total: how many there are, i32[B', L', Q].
  """

  block: jax.Array
  order: jax.Array
  unmasked: jax.Array
  total: jax.Array


class Queries(NamedTuple):
  """Marks of the queries, i32[B or 1, Q, tile]; tiles are full."""

  top: jax.Array  # the last position that is seen, -1 for no query
  low: jax.Array  # the position before the first one
  segment: jax.Array | None


class Keys(NamedTuple):
  """Marks of the keys, i32[B or 1, P, K, block]."""

  pos: jax.Array | None  # BEYOND for no key; None: their places
  segment: jax.Array | None


def queries(cut: Cut, marks: Marks, rule: Rule) -> Queries:
  """Cuts the marks of queries into tiles; what fills the last is a copy."""
  tile = lambda x: jnp.pad(
    x, ((0, 0), (0, cut.tiles * cut.block_q - x.shape[1])), mode="edge"
  ).reshape(-1, cut.tiles, cut.block_q)
  pos = marks.q_pos
  if pos is None:
    pos = jnp.arange(cut.shape[3], dtype=jnp.int32)[None]
  top = pos if rule.causal else jnp.full_like(pos, BEYOND - 1)
  low = jnp.full_like(pos, -1)
  if rule.window is not None:
    low = pos - rule.window
  top = jnp.where(pos >= 0, top, -1)
  segment = marks.q_segment
  return Queries(
    tile(top), tile(low), None if segment is None else tile(segment)
  )


def keys(cut: Cut, marks: Marks) -> Keys:
  """Cuts the marks of keys into blocks; what fills the last is no key."""

  def block(x, fill):
    pad = cut.blocks * cut.block_kv - x.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, pad)), constant_values=fill)
    return x.reshape(*x.shape[:2], cut.blocks, cut.block_kv)

  pos, segment = marks.kv_pos, marks.kv_segment
  if pos is not None:
    pos = block(jnp.where(pos >= 0, pos, BEYOND), BEYOND)
  if segment is not None:
    segment = block(segment[:, None], 0)
  return Keys(pos, segment)


def entries(
  cut: Cut,
  lists: BlockLists,
  q: Queries,
  k: Keys,
  span: tuple[jax.Array, int] | None = None,
) -> Entries:
  """Sorts the entries.

  Args:
    cut: the static sizes.
    lists: what the caller gave.
    q, k: the marks.
    span: only blocks `first .. first + count - 1`.
  """
  capacity = cut.lists[3]
  index = jnp.clip(jnp.broadcast_to(lists.index, cut.lists), 0, cut.blocks - 1)
  count = jnp.broadcast_to(lists.count, cut.lists[:3])
  live = jnp.arange(capacity) < count[..., None]
  if span is not None:
    first, size = span
    live &= (index >= first) & (index < first + size)
  of_block = lambda x: _picked(x, index)
  of_tile = lambda x: x[:, None, :, None]
  if k.pos is None:  # nothing to look up
    first = index * cut.block_kv
    last = jnp.minimum(first + cut.block_kv, cut.shape[4]) - 1
    most = jnp.where(last + 1 < first + cut.block_kv, BEYOND, last)
  else:
    key = jnp.where(k.pos == BEYOND, -1, k.pos)
    first, last, most = map(
      of_block, (k.pos.min(-1), key.max(-1), k.pos.max(-1))
    )
  seen = (first <= of_tile(q.top.max(-1))) & (last > of_tile(q.low.min(-1)))
  whole = (most <= of_tile(q.top.min(-1))) & (first > of_tile(q.low.max(-1)))
  if q.segment is not None and k.segment is not None:
    least, most = (of_block(f(k.segment, -1)) for f in (jnp.min, jnp.max))
    first_q, last_q = (of_tile(f(q.segment, -1)) for f in (jnp.min, jnp.max))
    seen &= (least <= last_q) & (most >= first_q)
    whole &= (least == most) & (first_q == last_q) & (least == first_q)
  live &= seen
  if lists.rows is not None:
    some = jnp.broadcast_to(lists.rows.any(-1), cut.lists)
    live &= some
    whole &= jnp.broadcast_to(lists.rows.all(-1), cut.lists)
  kind = jnp.where(live, jnp.where(whole, 0, 1), 2)
  _, block, order = jax.lax.sort(
    (kind * (1 << 17) + index, index, jnp.arange(capacity) + 0 * index),
    num_keys=1,
  )
  block, order = block.astype(jnp.int32), order.astype(jnp.int32)
  total, unmasked = live.sum(-1), (live & whole).sum(-1)
  # A step is filled up with the last entry: what it loads is of the same list.
  final = jnp.take_along_axis(block, jnp.maximum(total[..., None] - 1, 0), -1)
  block = jnp.where(jnp.arange(capacity) < total[..., None], block, final)
  return Entries(block, order, unmasked, total)


def rows(
  cut: Cut,
  lists: BlockLists,
  q: Queries,
  k: Keys,
  span: tuple[jax.Array, int] | None = None,
) -> Rows:
  """Sorts the entries and packs them; arguments as those of `entries`."""
  found = entries(cut, lists, q, k, span)
  room = 2 * (cut.words - 1)
  fill = jnp.broadcast_to(
    found.block[..., -1:], (*cut.lists[:3], room - cut.lists[3])
  )
  block = jnp.concatenate([found.block, fill], -1)
  header = found.unmasked | (found.total << 16)
  words = block[..., 0::2] | (block[..., 1::2] << 16)
  words = jnp.concatenate([header[..., None], words], -1).astype(jnp.int32)
  looks = None
  if lists.rows is not None:
    looks = jnp.tile(bits(cut, lists.rows, found.order), cut.stack)
  return Rows(words, found.order, looks)


def _picked(x: jax.Array, index: jax.Array) -> jax.Array:
  """x[B', P, K] at the blocks of the lists, [B', L', Q, C]."""
  x = jnp.broadcast_to(x, (len(index), *x.shape[1:]))
  flat = index.reshape(len(index), x.shape[1], -1)
  return jnp.take_along_axis(x, flat, axis=-1).reshape(index.shape)


def bits(cut: Cut, looks: jax.Array, order: jax.Array) -> jax.Array:
  """Packs bool[B, L, Q, C, block_q] as `Rows` says, in the order of the rows.

  Returns i32[B', L', Q, W, block_q].
  """
  looks = jnp.broadcast_to(looks, (*cut.lists, cut.block_q))
  looks = jnp.take_along_axis(looks, order[..., None], axis=3)
  words = math.ceil(cut.lists[3] / 32)
  spare = 32 * words - cut.lists[3]
  looks = jnp.pad(looks, ((0, 0),) * 3 + ((0, spare), (0, 0)))
  looks = looks.reshape(*cut.lists[:3], words, 32, cut.block_q)
  shift = jnp.arange(32, dtype=jnp.uint32)[:, None]
  words = (looks.astype(jnp.uint32) << shift).sum(-2, dtype=jnp.uint32)
  return jax.lax.bitcast_convert_type(words, jnp.int32)


def query_marks(cut: Cut, q: Queries) -> jax.Array:
  """Rows top, low and segment of each tile, i32[B or 1, Q, 8, N]."""
  segment = jnp.zeros_like(q.top) if q.segment is None else q.segment
  marks = jnp.stack(jnp.broadcast_arrays(q.top, q.low, segment), axis=2)
  marks = jnp.pad(marks, ((0, 0), (0, 0), (0, MARKS - 3), (0, 0)))
  return jnp.tile(marks, cut.stack)


def key_marks(cut: Cut, marks: Marks, k: Keys) -> jax.Array | None:
  """Rows position, segment and bias, i32[B or 1, P, K, 8, block].

  None where keys carry nothing but their places; the bias is in units of
  log 2.
  """
  if all(x is None for x in (marks.kv_pos, marks.kv_segment, marks.kv_bias)):
    return None
  pos = k.pos
  if pos is None:
    place = jnp.arange(cut.blocks * cut.block_kv, dtype=jnp.int32)
    pos = jnp.where(place < cut.shape[4], place, BEYOND)
    pos = pos.reshape(1, 1, cut.blocks, cut.block_kv)
  segment = jnp.zeros_like(pos) if k.segment is None else k.segment
  bias = jnp.zeros_like(pos)
  if marks.kv_bias is not None:
    pad = cut.blocks * cut.block_kv - cut.shape[4]
    bias = jnp.pad(marks.kv_bias * LOG2E, ((0, 0), (0, 0), (0, pad)))
    bias = bias.reshape(*bias.shape[:2], cut.blocks, cut.block_kv)
    bias = jax.lax.bitcast_convert_type(bias, jnp.int32)
  each = jnp.stack(jnp.broadcast_arrays(pos, segment, bias), axis=3)
  return jnp.pad(each, ((0, 0),) * 3 + ((0, MARKS - 3), (0, 0)))


def in_parts(
  cut: Cut, words: jax.Array, first: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array]:
  """The words of each part, flat, and (batch, work head, first) of each."""
  over_batch, over_heads = cut.parts
  batch, heads, _ = cut.part_rows
  words = words.reshape(over_batch, batch, over_heads, heads, -1)
  words = words.swapaxes(1, 2).reshape(over_batch * over_heads, -1)
  n, m, _ = cut.part
  starts = [
    jnp.stack(
      [jnp.int32(i * n), jnp.int32(j * m), jnp.asarray(first, jnp.int32)]
    )
    for i in range(over_batch)
    for j in range(over_heads)
  ]
  return words, jnp.stack(starts)
