# SPDX-License-Identifier: Apache-2.0
"""The sizes of tiles: a rule over the figures of the chip.

Found on the compiler's schedules of v5e, v5p and v6e (`benchmarks/tpu_cycles`):

* A basic block costs 200 (v5e) to 300 cycles (v6e) beside its matmuls, to fill
  and drain the units, whatever it holds.  Blocks of up to 16 thousand cycles
  keep that below 2 % and 3 %; longer ones cost compile time and gain little.
* Rows stream through a systolic array of d x d: parts of d / 2 rows, if they
  are as wide as a strip, cost little more than their share.
* Strips are as wide as VMEM allows with four buffers of weights, or three:
  every strip reads all rows again.

There is no table of special shapes: for none has anything better been found.
"""

import dataclasses
import math
from collections.abc import Iterator

from jax.experimental.pallas import tpu as pltpu

LANES = 128
BLOCK_CYCLES = 16_384
CHUNK_BYTES = 2 << 20
MOST_PARTS = 8
SUMS_HEIGHT = 256
SLAB = 512
WHOLE_ROWS = 1024
"""Features that fill whole registers, for rows picked one by one."""
MARGIN = 4 << 20
"""Bytes of VMEM left to what the compiler keeps for itself, beside a tenth."""


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How a kernel cuts its work.

  Attributes:
    height: rows of a tile.
    part: rows multiplied at a time where a border is inside; divides `height`.
    width: columns of a strip.
    chunk: columns of one load of weights; divides `piece`.
    piece: columns multiplied in one block of the schedule; divides `width`.
    depth: groups whose weights there is room for, at least 2.
    cores: TensorCores that share the strips.
    slab: rows of an unsorted x that are read at a time; 0: it is sorted.
    vmem_limit_bytes: what the compiler may use.
  """

  height: int
  part: int
  width: int
  chunk: int
  piece: int
  depth: int = 3
  cores: int = 1
  slab: int = 0
  vmem_limit_bytes: int | None = None


def chip() -> pltpu.TpuInfo:
  """The chip compiled for; where that is unknown, one of little VMEM."""
  try:
    return pltpu.get_tpu_info()
  except ValueError:  # no TPU here: an export, or the interpreter
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 1)


def matmul_tiles(
  rows: int,
  features: int,
  columns: int,
  itemsize: int,
  *,
  gathered: int = 0,
  info: pltpu.TpuInfo | None = None,
) -> Tiles | None:
  """Tiles for y[rows, columns] = x[rows, features] w; None if nothing fits.

  `gathered` is the number of rows of an unsorted x to keep in VMEM, 0 if x is
  sorted; it takes a multiple of 1024 features.  Features and columns are at
  least multiples of 128.
  """
  if gathered and features % WHOLE_ROWS:
    return None
  info = info or chip()
  part = info.mxu_column_size // 2
  slab = min(SLAB, round_up(gathered, 16))
  kept = round_up(gathered, slab or 1) * 4 + 2 * slab * itemsize
  for width, cores in widths(columns, info):
    if slab and width < min(WHOLE_ROWS, columns // cores):
      return None  # picking takes longer than such a narrow matmul
    height = tallest(rows, features * width, part, info)
    for depth in (4, 3, 2):
      need = features * kept + itemsize * (
        depth * features * width
        + (1 if slab else 2) * height * features
        + 2 * height * width
      )
      if limit := vmem_limit(need, info):
        chunk = divisor(width, CHUNK_BYTES // (features * itemsize))
        piece = divisor(width, block(height * features, info), chunk)
        return Tiles(
          height, part, width, chunk, piece, depth, cores, slab, limit
        )
  return None


def sums_tiles(
  rows: int,
  features: int,
  columns: int,
  itemsize: int,
  *,
  info: pltpu.TpuInfo | None = None,
) -> Tiles | None:
  """Tiles for z[features, columns] = x[rows, features]^T dy[rows, columns]."""
  info = info or chip()
  part = info.mxu_column_size
  height = min(round_up(rows, part), SUMS_HEIGHT)
  for width, cores in widths(columns, info):
    need = features * width * (4 + 2 * itemsize)
    need += 2 * height * (features + width) * itemsize
    if limit := vmem_limit(need, info):
      piece = divisor(width, block(height * features, info))
      chunk = divisor(piece, width // 8)
      return Tiles(height, part, width, chunk, piece, 2, cores, 0, limit)
  return None


def tallest(rows: int, macs: int, part: int, info: pltpu.TpuInfo) -> int:
  """The height that pads `rows` least; of these, what best fills a block.

  `macs` are multiply-adds of a row in a strip.
  """
  most = BLOCK_CYCLES * info.num_mxus * info.mxu_column_size**2 // macs
  count = min(max(most // part, 1), MOST_PARTS)
  choices = range(part, (count + 1) * part, part)
  return min(choices, key=lambda h: (round_up(rows, h), -h))


def widths(columns: int, info: pltpu.TpuInfo) -> Iterator[tuple[int, int]]:
  """Columns of a strip and cores that share the strips, the widest first."""
  cores = info.num_cores if columns % (info.num_cores * LANES) == 0 else 1
  lanes = columns // cores // LANES
  for n in range(1, lanes + 1):
    if lanes % n == 0:
      yield lanes // n * LANES, cores


def vmem_limit(need: int, info: pltpu.TpuInfo) -> int | None:
  """What the compiler may use for `need` bytes; None if that is too much."""
  limit = need + need // 10 + MARGIN
  return limit if limit <= info.vmem_capacity_bytes else None


def block(macs_per_column: int, info: pltpu.TpuInfo) -> int:
  """Columns that fill a block of the schedule."""
  per_cycle = info.num_mxus * info.mxu_column_size**2
  return BLOCK_CYCLES * per_cycle // macs_per_column


def divisor(width: int, most: int, multiple: int = LANES) -> int:
  """The largest multiple of `multiple` that divides `width`, up to `most`."""
  units = width // multiple
  fits = lambda n: units % n == 0 and units // n * multiple <= most
  return (
    units // next((n for n in range(1, units) if fits(n)), units) * multiple
  )


def round_up(n: int, multiple: int) -> int:
  """The next multiple."""
  return math.ceil(n / multiple) * multiple
