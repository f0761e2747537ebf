# SPDX-License-Identifier: Apache-2.0
"""What the Hopper kernel is told: its static sizes, its lists and its marks.

A *unit* is the query heads that share a list and a key head.  The queries of a
unit in a tile are cut into *pieces* of 64, one for each warp group that
multiplies; a thread block makes one or two of them, over the same keys.

Axes: as in `types`; U units of a batch row.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention import cuts, plan
from pallas_kernels.block_sparse_attention.cuts import Cut
from pallas_kernels.block_sparse_attention.types import BlockLists, Marks, Rule

PIECE = 64
"""Queries of a warp group: the rows that wgmma multiplies at once."""
WIDTHS = (64, 128)
"""Widths of heads, and of key blocks, that the kernel multiplies."""
ROWS = 8
"""Operands lie in shared memory in blocks of so many rows."""
SHARED_MEMORY = 232_448
"""Bytes that a thread block may have."""
MOST_STAGES = 4


class Place(NamedTuple):
  """Where a thread block works, i32 scalars."""

  batch: Any
  unit: Any
  tile: Any
  part: Any  # which of the groups of pieces


@dataclasses.dataclass(frozen=True)
class Sizes:
  """All that is static about a launch.

  Attributes:
    cut: the sizes of the arrays and lists; its blocks are those of the kernel.
    bytes: of an element.
    marks: names of those of keys, as `Told.keys` has them.
  """

  cut: Cut
  bytes: int
  marks: tuple[str, ...]

  @property
  def units(self) -> int:
    _, heads, groups, *_ = self.cut.shape
    return heads if self.cut.lists[1] == heads else groups

  @property
  def heads(self) -> int:
    """Query heads of a unit."""
    return self.cut.shape[1] // self.units

  @property
  def pieces(self) -> int:
    """Of a unit in a tile."""
    return self.heads * self.cut.block_q // PIECE

  @property
  def multipliers(self) -> int:
    """Warp groups that multiply."""
    return 2 if self.pieces % 2 == 0 else 1

  @property
  def grid(self) -> int:
    """Thread blocks."""
    parts = self.pieces // self.multipliers
    return self.cut.shape[0] * self.units * self.cut.tiles * parts

  @property
  def stages(self) -> int:
    """Key blocks in shared memory, or on their way."""
    width, value_width = self.cut.shape[-2:]
    key = self.bytes * (width + value_width) + 4 * len(self.marks)
    query = self.bytes * (width + value_width * (width != value_width)) + 4
    room = SHARED_MEMORY - self.multipliers * PIECE * query - 2048
    return min(MOST_STAGES, room // (key * self.cut.block_kv))

  def place(self, item: Any) -> Place:
    """Of thread block `item`; tiles that see more come first."""
    parts, tiles = self.pieces // self.multipliers, self.cut.tiles
    rest, part = _divmod(item, parts)
    rest, tile = _divmod(rest, tiles)
    batch, unit = _divmod(rest, self.units)
    return Place(batch, unit, tiles - 1 - tile, part)

  def piece(self, place: Place, warp_group: Any) -> tuple[Any, Any]:
    """The head of its piece, and its first query."""
    number = place.part * self.multipliers + warp_group
    head, piece = _divmod(number, self.cut.block_q // PIECE)
    head += place.unit * self.heads
    return head, place.tile * self.cut.block_q + piece * PIECE

  def owner(self, place: Place, ref: Any) -> tuple[Any, Any]:
    """What of an array [B or 1, heads, ...] is of a unit."""
    batch, heads = ref.shape[:2]
    unit = lax.div(place.unit * heads, self.units)
    return place.batch if batch > 1 else 0, unit


def _divmod(n: Any, by: int) -> tuple[Any, Any]:
  whole = lax.div(n, jnp.int32(by))
  return whole, n - whole * by


class Told(NamedTuple):
  """The arrays of the kernel besides queries, keys and values.

  Attributes:
    block: key blocks of each row, those that need no mask first,
      i32[B', L', Q, C].
    unmasked, total: entries of each row, i32[B', L', Q].
    queries: last position seen, position before the first one, and segment,
      i32[B', 3, Q x block_q].
    keys: pos, segment (i32) and bias (f32, in units of log 2), those there are,
      [B', P', K, block].
    bits: which queries look at each entry, i32[B', L', Q, W, block_q], or None.
    sinks: in units of log 2, f32[H], or None.
  """

  block: jax.Array
  unmasked: jax.Array
  total: jax.Array
  queries: jax.Array
  keys: dict[str, jax.Array]
  bits: jax.Array | None
  sinks: jax.Array | None


def sizes(
  q: jax.Array, k: jax.Array, v: jax.Array, lists: BlockLists, marks: Marks
) -> Sizes:
  """Of a call whose lists are already `split`."""
  batch, heads, queries, width = q.shape
  _, groups, keys, value_width = v.shape
  shape = batch, heads, groups, queries, keys, width, value_width
  of_lists = cuts.list_shape(shape, lists, marks)
  cut = Cut(shape, of_lists, lists.block_q, lists.block_kv)
  given = {
    "pos": marks.kv_pos,
    "segment": marks.kv_segment,
    "bias": marks.kv_bias,
  }
  names = tuple(name for name, mark in given.items() if mark is not None)
  return Sizes(cut, q.dtype.itemsize, names)


def split(lists: BlockLists) -> BlockLists:
  """The same lists in blocks of 128 keys, or 64."""
  block = max(width for width in WIDTHS if lists.block_kv % width == 0)
  parts = lists.block_kv // block
  if parts == 1:
    return lists
  index = lists.index[..., None] * parts + jnp.arange(parts)
  index = index.reshape(*lists.index.shape[:3], -1)
  rows = lists.rows
  if rows is not None:
    rows = jnp.repeat(rows, parts, axis=3)
  return BlockLists(index, lists.count * parts, rows, lists.block_q, block)


def told(cut: Cut, lists: BlockLists, marks: Marks, rule: Rule) -> Told:
  """Sorts the lists, and brings the marks into the form of the kernel."""
  of_queries = plan.queries(cut, marks, rule)
  of_keys = plan.keys(cut, marks)
  found = plan.entries(cut, lists, of_queries, of_keys)
  segment = of_queries.segment
  if segment is None:
    segment = jnp.zeros_like(of_queries.top)
  marked = jnp.broadcast_arrays(of_queries.top, of_queries.low, segment)
  marked = jnp.stack([x.reshape(len(x), -1) for x in marked], axis=1)
  bias, sinks, bits = marks.kv_bias, marks.sinks, None
  if bias is not None:
    pad = cut.blocks * cut.block_kv - cut.shape[4]
    bias = jnp.pad(bias * plan.LOG2E, ((0, 0), (0, 0), (0, pad)))
    bias = bias.reshape(*bias.shape[:2], cut.blocks, cut.block_kv)
    bias = bias.astype(jnp.float32)
  if sinks is not None:
    sinks = sinks.astype(jnp.float32) * plan.LOG2E
  if lists.rows is not None:
    bits = plan.bits(cut, lists.rows, found.order)
  i32 = lambda x: x.astype(jnp.int32)
  keys = {"pos": of_keys.pos, "segment": of_keys.segment, "bias": bias}
  return Told(
    block=i32(found.block),
    unmasked=i32(found.unmasked),
    total=i32(found.total),
    queries=i32(marked),
    keys={name: x for name, x in keys.items() if x is not None},
    bits=bits,
    sinks=sinks,
  )


def whole_rows(x: jax.Array) -> jax.Array:
  """Fills the rows [B, H, rows, width] up with zeros to a multiple of eight."""
  more = -x.shape[2] % ROWS
  return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) if more else x


def flops(sizes: Sizes) -> int:
  """Of the lists, were all of them full."""
  batch, heads, *_, width, value_width = sizes.cut.shape
  pairs = math.prod(sizes.cut.lists[2:])
  pairs *= sizes.cut.block_q * sizes.cut.block_kv
  return 2 * batch * heads * pairs * (width + value_width)
