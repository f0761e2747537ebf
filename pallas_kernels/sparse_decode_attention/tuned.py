# SPDX-License-Identifier: Apache-2.0
"""The sizes of blocks: a rule over the figures of the chip.

Found on the compiler's schedules of v5e, v5p and v6e (`benchmarks/tpu_decode`):
a transfer takes some 0.44 us before its first byte, and a block of the schedule
some 500 cycles whatever it holds; blocks of 2 MB, thousands of cycles, with two
on their way hide both.
"""

import dataclasses
import math

import jax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.tuned import (
  LANES,
  chip,
  round_up,
  vmem_limit,
)
from pallas_kernels.sparse_decode_attention.pieces import everything, length
from pallas_kernels.sparse_decode_attention.types import Units

BLOCK_BYTES = 2 << 20
"""Of keys and values."""
LEAST_SLOTS = 512
MOST_HEADS = 8
"""Of an item; each is an unrolled part of the kernel."""
MOST_ITEMS = 8
"""Of a step."""
SUBLANES = 8
Shaped = jax.Array | jax.ShapeDtypeStruct
MOST_SCALARS = 200_000
"""32-bit words of the lists that fit the scalar memory of every chip, 1 MiB."""


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How the kernel cuts its work.

  Attributes:
    slots: of a block; a multiple of the lanes and of a piece.
    piece: slots of one transfer.
    heads: that are gathered for an item.
    items: of a step of the grid.
    cores: TensorCores that share the items.
    depth: blocks there is room for, at least 2.
    vmem_limit_bytes: what the compiler may use.
  """

  slots: int
  piece: int
  heads: int = 1
  items: int = 1
  cores: int = 1
  depth: int = 3
  vmem_limit_bytes: int | None = None


def blocks(
  q: Shaped,
  k: Shaped,
  v: Shaped,
  units: Units | None,
  page_table: Shaped | None,
  info: pltpu.TpuInfo | None = None,
) -> Blocks | None:
  """Blocks for arrays of these shapes; None if transfers would not be whole.

  Pages must be whole tiles of memory, 8 rows of f32, 16 of bf16 or 32 of int8,
  and heads 128 wide, or a multiple.
  """
  info = info or chip()
  (batch, heads, queries, width), (_, groups, page, _) = q.shape, k.shape
  itemsize, slots = k.dtype.itemsize, length(k, page_table)
  tile = SUBLANES * (4 // itemsize)
  lists = 1 if units is None else units.index.shape[1]
  owners = max(groups, lists)
  share = divisor(owners if lists > 1 else groups, MOST_HEADS)
  wide = itemsize * (width + v.shape[3])
  most = max(BLOCK_BYTES // (share * wide), LEAST_SLOTS)
  if units is not None:
    piece = min(units.unit, page)
    listed = units.index.shape[2] * units.unit
  else:
    piece, listed = divisor(slots, most) if page_table is None else page, slots
  alike = k.dtype == v.dtype and k.dtype in ("bfloat16", "float32", "int8")
  fits = alike and (k.dtype == "int8" or q.dtype == k.dtype)
  if (
    not fits
    or piece % tile
    or page % piece
    or width % LANES
    or v.shape[3] % LANES
    or slots * batch == 0
  ):
    return None
  step = math.lcm(LANES, piece)
  size = max(min(most, round_up(listed, step)) // step, 1) * step
  while share > 1 and info.num_cores > 1 and batch * owners // share % 2:
    share //= 2
  work = batch * owners // share
  cores = info.num_cores if work % info.num_cores == 0 else 1
  rows = heads // owners * queries
  lanes = round_up(listed, size) * 4
  for items in range(MOST_ITEMS, 0, -1):
    if work // cores % items:
      continue
    row = round_up(rows, SUBLANES)
    of_item = (
      2 * round_up(share * (1 if queries == 1 else rows), SUBLANES)
      + share * row
    ) * lanes  # marks, scales, scores
    of_item += share * row * (width + v.shape[3] + LANES) * 4
    need = 3 * share * size * wide + 2 * items * of_item
    need += share * size * (row * 8 + v.shape[3] * 4)
    if limit := vmem_limit(need, info):
      return Blocks(size, piece, share, items, cores, 3, limit)
  return None


def all_of(k: jax.Array, page_table: jax.Array | None, cut: Blocks) -> Units:
  """The whole cache, in pieces of `cut`."""
  return everything(k, page_table, cut.piece)


def divisor(n: int, most: int) -> int:
  """The largest divisor of n up to `most`."""
  return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
