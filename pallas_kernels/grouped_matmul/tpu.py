# SPDX-License-Identifier: Apache-2.0
"""The grouped matmul on TPU: y_m = x_m w_e for the rows m of group e.

It is bound by the matrix units where groups are large, and by memory where they
are small or the chip is fast.  The kernel is made for both:

* An item of the work list (`work.py`) is a tile of rows, multiplied with a
  strip of columns as wide as fits, so that rows are read once where they can
  be, and that the fixed price of a block of the schedule, 200 to 300 cycles on
  any chip, is paid once for 16 thousand.
* Weights pass through a ring of buffers (`ring.py`), one for each group, that
  loads ahead over the borders of groups and strips.  The compiler's own
  pipeline looks one step ahead, and waits at every border.
* A tile with a border inside is multiplied in parts of a quarter, those that
  have rows of the item: a border costs part of a tile, not a whole one.
* With `rows`, all of x is kept in VMEM, and the next rows are picked
  (`picking.py`) in the free slots of the matmul of the present ones.

Not here: adding weighted rows of y back to the tokens they came from.  XLA does
that in 40 (v5e) or 36 (v6e) thousand cycles for 8192 rows of 1024 and two rows
to a token, if told to gather once for each of the two and add, where a scatter
takes 350 and 159.  In the kernel a row takes 4 bundles at least, 33 thousand in
all, and a dozen cycles if it has to wait for the row before, which may be of
the same token; and sums of all tokens would occupy VMEM in f32.

Axes: M rows, T rows of an unsorted x, K features in, N features out, E groups;
tm height of a tile, tn width of a strip.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.launch import between, launch, loop
from pallas_kernels.grouped_matmul.picking import Picker
from pallas_kernels.grouped_matmul.ring import Ring, Scalar
from pallas_kernels.grouped_matmul.tuned import LANES, Tiles
from pallas_kernels.grouped_matmul.work import Work
from pallas_kernels.varying import result


def multiply(
  x: jax.Array,
  w: jax.Array,
  work: Work,
  rows: jax.Array | None,
  *,
  tiles: Tiles,
  transpose_w: bool,
  interpret: Any,
  debug: bool,
) -> jax.Array:
  """y[M, N]; `tiles` must divide all sizes (`ops.py` pads).

  Args:
    x: [M, K] in order of groups, or [T, K] with `rows`.
    w: [E, K, N], or [E, N, K] with `transpose_w`.
    work: the items of a map over rows, of tiles of `tiles.height`.
    rows: i32[M], the row of x in each place.
    tiles: `slab` is not 0 if there are `rows`.
    transpose_w, interpret, debug: as in `ops.py`.
  """
  count, *lists = work
  lists += [] if rows is None else [rows]
  size, features = len(x) if rows is None else len(rows), x.shape[1]
  groups, columns = len(w), w.shape[1 if transpose_w else 2]
  height, width = tiles.height, tiles.width
  strips = columns // width // tiles.cores

  def x_block(c, s, i, group, tile, offsets, *_):
    """Past the last group nothing is read: the block there stays as it is."""
    last = lax.div(jnp.maximum(offsets[groups] - 1, 0), height)
    return jnp.minimum(tile[i], last), 0

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  reads = (size * strips if rows is None else len(x)) * tiles.cores
  kernel = functools.partial(_kernel, tiles=tiles, transpose_w=transpose_w)
  return launch(
    kernel,
    "grouped_matmul",
    result((size, columns), x.dtype, x, w, *lists),
    lists,
    (x, w),
    grid=(tiles.cores, strips, count),
    in_specs=[
      anywhere if tiles.slab else pl.BlockSpec((height, features), x_block),
      anywhere,
    ],
    out_specs=pl.BlockSpec(
      (height, width),
      lambda c, s, i, group, tile, *_: (tile[i], c * strips + s),
    ),
    scratch_shapes=_scratch(x, tiles, transpose_w),
    tiles=tiles,
    flops=2 * size * features * columns,
    moved=reads * features + groups * features * columns + size * columns,
    interpret=interpret,
    debug=debug,
  )


def _scratch(x: jax.Array, tiles: Tiles, transpose_w: bool) -> list[Any]:
  """What `Ring`, and with unsorted rows `Picker`, need."""
  features = x.shape[1]
  buffer = (features, tiles.width)
  ring = [
    pltpu.VMEM((tiles.depth, *buffer[:: -1 if transpose_w else 1]), x.dtype),
    pltpu.SemaphoreType.DMA((tiles.depth, tiles.width // tiles.chunk)),
    pltpu.SMEM((1,), jnp.int32),
  ]
  if not tiles.slab:
    return ring
  words = tiles.height * x.dtype.itemsize // 4
  return ring + [
    pltpu.VMEM((words, features), jnp.uint32),
    pltpu.VMEM((x.size // LANES, LANES), jnp.float32),
    pltpu.VMEM((2, tiles.slab, features), x.dtype),
    pltpu.SemaphoreType.DMA((2,)),
  ]


def _kernel(*refs, tiles: Tiles, transpose_w: bool):
  """One item: a tile of rows and a group, times a strip of columns.

  Scalars in SMEM: the lists of `Work` from `group` on; with rows i32[M].
  In: x, [tm, K] in VMEM, or [T, K] in HBM with rows; w, [E, K, N] in HBM.
  Out: y, [tm, tn] in VMEM, kept there as long as items are of the same tile.
  Scratch: see `Ring`, and with rows `Picker`.
  """
  group, tile, offsets, ordinal, order, begin, *refs = refs
  rows = refs.pop(0) if tiles.slab else None
  x_ref, w_ref, y_ref, loads, sems, started, *scratch = refs
  # Read here: the interpreter has none inside of branches.
  core, strip, i = (pl.program_id(n) for n in range(3))
  strips, items = pl.num_programs(1), pl.num_programs(2)
  e, groups, height = group[i], w_ref.shape[0], tiles.height
  ring = Ring(
    w_ref, loads, sems, started, order, begin, ordinal[groups], core, strips,
    tiles.chunk, transpose_w,
  )  # fmt: skip
  visit = strip * ring.visits + ordinal[e]
  low, high = (offsets[e + n] - tile[i] * height for n in (0, 1))
  begins = (strip == 0) & (i == 0)
  live = e < groups
  arrives = live & ((i == 0) | (group[jnp.maximum(i - 1, 0)] != e))
  whole = live & (low <= 0) & (high >= height) & ~begins
  following = tile[jnp.where(i + 1 < items, i + 1, 0)]
  opens = (i == 0) | (tile[jnp.maximum(i - 1, 0)] != tile[i])
  closes = (i + 1 == items) | (following != tile[i])
  picker = None if rows is None else Picker(rows, x_ref, *scratch)
  load = picker.load if picker else lambda at, size: x_ref[pl.ds(at, size), :]
  item = _Item(load, y_ref, ring, visit, low, high, tiles)

  @pl.when(begins)
  def prepare():
    started[0] = 0
    if picker:  # after the first chunk of weights, before the others
      ring.start(jnp.minimum(ring.visits, 1))
      picker.keep()
      picker.pick(tile[i], 0)

  ring.advance(visit, strip * items + i, items)
  if picker:
    pl.when(opens & ~whole)(lambda: picker.pick(tile[i], 1))
  pl.when(begins & live)(item.as_weights_arrive)
  pl.when(arrives & ~begins)(lambda: ring.wait(visit))

  @pl.when(whole)
  def all_rows():
    if not picker:
      item.dots(0, height)
    else:  # each pick fits into the block of the dots after it
      picker.pick(tile[i], 1, unroll=True)
      item.dots(0, height // 2)
      picker.pick(following, 0, unroll=True)
      item.dots(height // 2, height // 2)

  pl.when(live & ~whole & ~begins)(item.some_rows)
  pl.when(~live)(item.nobodys_rows)
  if picker:
    pl.when(closes & ~whole)(lambda: picker.pick(following, 0))


@dataclasses.dataclass(frozen=True)
class _Item:
  """Rows `low .. high - 1` of a tile are of the group of `visit`."""

  load: Callable[[Scalar, int], jax.Array]  # (first row, rows) -> rows of x
  y: Any  # [tm, tn]
  ring: Ring
  visit: Scalar
  low: Scalar
  high: Scalar
  tiles: Tiles

  def dot(self, at: Scalar, size: int, start: Scalar, width: int, masked: bool):
    """y[at, start] = x[at] w[start]; if masked, only rows of the group."""
    here = (pl.ds(at, size), pl.ds(start, width))
    y = lax.dot_general(
      self.load(at, size),
      self.ring.loaded(self.visit, start, width),
      (((1,), (1 if self.ring.transposed else 0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    if masked:
      mine = between(self.low - at, self.high - at, y.shape)
      y = jnp.where(mine, y, self.y[here].astype(jnp.float32))
    self.y[here] = y.astype(self.y.dtype)

  def dots(self, at: Scalar, size: int, masked: bool = False) -> None:
    """All columns of some rows."""
    piece = self.tiles.piece

    @functools.partial(loop, self.tiles.width // piece)
    def _(n):
      start = pl.multiple_of(n * piece, piece)
      self.dot(at, size, start, piece, masked)

  def some_rows(self) -> None:
    """The parts that have rows of the group."""

    @self.parts
    def _(at):
      here = (self.low < at + self.tiles.part) & (self.high > at)
      pl.when(here)(lambda: self.dots(at, self.tiles.part, masked=True))

  def nobodys_rows(self) -> None:
    """Zeros, for the rows past the last group."""

    @self.parts
    def _(at):
      here = pl.ds(at, self.tiles.part)
      old = self.y[here, :].astype(jnp.float32)
      dead = between(self.low - at, self.high - at, old.shape)
      self.y[here, :] = jnp.where(dead, 0, old).astype(self.y.dtype)

  def as_weights_arrive(self) -> None:
    """The first item: nothing is there yet, so chunk by chunk."""

    @pl.loop(0, self.ring.chunks)
    def _(n):
      self.ring.copy(n).wait()
      start = pl.multiple_of(n * self.tiles.chunk, self.tiles.chunk)
      self.dot(0, self.tiles.height, start, self.tiles.chunk, masked=True)

  def parts(self, body: Callable[[Scalar], None]) -> None:
    """`body(first row)` of each part of the tile."""
    part = self.tiles.part
    pl.loop(0, self.tiles.height // part)(
      lambda n: body(pl.multiple_of(n * part, part))
    )
