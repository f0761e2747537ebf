# SPDX-License-Identifier: Apache-2.0
"""The grouped matmul on TPU: y_m = x_m w_e for the rows m of group e.

What bounds it is the multiplication unit where groups are large, and the
memory where they are small or the chip is fast; the kernel is made for both.

* An item of the work list (`work.py`) is a tile of rows times a strip of
  columns as wide as fits, so that rows are read once where they can be, and
  the fixed price of a block of the schedule, 200 to 300 cycles on any chip, is
  paid once for 16 thousand.
* Weights pass through a ring of `depth` buffers, one for each visited group,
  that loads ahead over the borders of groups and strips.  A step loads as many
  chunks as it takes for each of the next groups to be there one item before its
  turn, if every step did the same: even where sizes are, early before a run of
  small groups.  The compiler's own pipeline looks one step ahead, and waits at
  every border.
* A tile with a border inside is multiplied in parts of a quarter, those that
  have rows of the item, so that a border costs a quarter of a tile and not one.
* With `rows`, all of `x` is kept in VMEM and the next rows are picked while the
  present ones are multiplied: vector loads in free slots, instead of a copy of
  `x` in group order through memory.  They are kept as 32-bit words, since a row
  of bf16 is half of each word; where VMEM cannot hold that, `x[rows]` it is.

Adding weighted rows of y back to their places inside this kernel does not pay:
it needs all columns of f32 sums of all tokens in VMEM beside the weights.

Axes: M rows, T rows of an unsorted x, K features in, N features out, E groups;
tm height of a tile, tn width of a strip, S strips, D depth of the ring.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.tuned import Tiles
from pallas_kernels.grouped_matmul.work import Work

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
    rows: i32[M], the row of `x` in each place.
  """
  count, *lists = work
  features = x.shape[1]
  groups, columns = len(w), w.shape[1 if transpose_w else 2]
  height, width = tiles.height, tiles.width
  strips = columns // width // tiles.cores
  size = len(x) if rows is None else len(rows)
  ring = (tiles.depth, *((width, features)[:: 1 if transpose_w else -1]))
  scratch = [
    pltpu.VMEM(ring, w.dtype),
    pltpu.SemaphoreType.DMA((tiles.depth, width // tiles.chunk)),
    pltpu.SMEM((1,), jnp.int32),
  ]
  if rows is None:
    # Past the last group nothing is read: the block there stays as it is.
    last = lambda end: lax.div(jnp.maximum(end - 1, 0), height)
    x_spec = pl.BlockSpec(
      (height, features),
      lambda c, s, i, group, tile, offsets, *_: (
        jnp.minimum(tile[i], last(offsets[groups])), 0,
      ),
    )  # fmt: skip
  else:
    lists.append(rows)
    x_spec = pl.BlockSpec(memory_space=pl.ANY)
    scratch += [
      pltpu.VMEM((height, features), x.dtype),
      pltpu.VMEM(x.shape, jnp.float32),
      pltpu.VMEM((2, tiles.slab, features), x.dtype),
      pltpu.SemaphoreType.DMA((2,)),
    ]
  reads = size * strips * tiles.cores if rows is None else len(x) * tiles.cores
  return pl.pallas_call(
    functools.partial(
      _kernel, tiles=tiles, transpose_w=transpose_w, gather=rows is not None
    ),
    out_shape=jax.ShapeDtypeStruct((size, columns), x.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(lists),
      grid=(tiles.cores, strips, count),
      in_specs=[x_spec, pl.BlockSpec(memory_space=pl.ANY)],
      out_specs=pl.BlockSpec(
        (height, width),
        lambda c, s, i, group, tile, *_: (tile[i], c * strips + s),
      ),
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=tiles.vmem_limit_bytes,
      disable_bounds_checks=not debug,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * size * features * columns,
      bytes_accessed=x.dtype.itemsize
      * (reads * features + groups * features * columns + size * columns),
      transcendentals=0,
    ),
    interpret=interpret,
    name="grouped_matmul",
  )(*lists, x, w)


@dataclasses.dataclass(frozen=True)
class _Ring:
  """The weights of the groups to come, on their way into VMEM.

  The stream of *loads* is strips x visited groups x chunks of columns; it goes
  on from strip to strip, and stops at the end of a core's strips.
  """

  hbm: Any  # w, [E, K, N] or [E, N, K]
  vmem: Any  # [D, K, tn] or [D, tn, K]
  sems: Any  # [D, tn / chunk]
  started: Any  # i32[1] in SMEM: loads started so far
  order: Any
  begin: Any
  visits: jax.Array  # groups visited in a strip
  strips: jax.Array  # strips of this core
  chunk: int
  transposed: bool

  @property
  def chunks(self) -> int:
    """Loads per group and strip."""
    return self.sems.shape[1]

  def columns(self, ref: Any, lead: Any, start: Any, size: int) -> Any:
    """`ref[lead]` at columns `start .. start + size - 1` of w."""
    at = pl.ds(pl.multiple_of(start, self.chunk), size)
    return ref.at[lead, at, :] if self.transposed else ref.at[lead, :, at]

  def copy(self, load: jax.Array) -> Any:
    """The transfer number `load`."""
    visit = lax.div(load, self.chunks)
    chunk = load - visit * self.chunks
    strip = lax.div(visit, self.visits)
    group = self.order[visit - strip * self.visits]
    slot = lax.rem(visit, self.vmem.shape[0])
    strip += pl.program_id(0) * self.strips
    here = chunk * self.chunk
    there = strip * (self.chunks * self.chunk) + here
    return pltpu.make_async_copy(
      self.columns(self.hbm, group, there, self.chunk),
      self.columns(self.vmem, slot, here, self.chunk),
      self.sems.at[slot, chunk],
    )

  def start(self, goal: jax.Array) -> None:
    """Starts the loads before `goal` that have not started."""
    lax.fori_loop(
      self.started[0], goal, lambda n, _: self.copy(n).start(), None
    )
    self.started[0] = jnp.maximum(goal, self.started[0])

  def advance(self, visit: jax.Array, step: jax.Array, items: jax.Array):
    """Keeps the ring filled at step `step`, of `items` in each strip."""
    depth, last = self.vmem.shape[0], self.strips * self.visits - 1
    goal = jnp.minimum((visit + 1) * self.chunks, (last + 1) * self.chunks)
    done = self.started[0]
    for ahead in range(1, depth):
      then = jnp.clip(visit + ahead, 0, jnp.maximum(last, 0))
      strip = lax.div(then, jnp.maximum(self.visits, 1))
      first = strip * items + self.begin[then - strip * self.visits]
      left = jnp.maximum(first - step - 1, 1)
      missing = (then + 1) * self.chunks - done
      goal = jnp.maximum(goal, done + lax.div(missing + left - 1, left))
    most = jnp.minimum(visit + depth, last + 1) * self.chunks
    self.start(jnp.minimum(goal, most))


def _kernel(*refs, tiles: Tiles, transpose_w: bool, gather: bool):
  """One item: a tile of rows and a group, times a strip of columns.

  Scalars in SMEM, the lists of `Work` from `group` on, and rows, i32[M].
  In: x, [tm, K] in VMEM, or [T, K] in HBM with rows; w, [E, K, N] in HBM.
  Out: y, [tm, tn] in VMEM, kept there as long as items are of the same tile.
  Scratch: see `_Ring`; with rows: the picked rows, [tm, K]; all rows,
  f32[T, K]; two slabs on their way, [2, slab, K]; their semaphores, [2].
  """
  group, tile, offsets, ordinal, order, begin, *refs = refs
  if gather:
    rows, x_hbm, w_hbm, y_ref, *ring, x_ref, kept, slabs, slab_sems = refs
  else:
    x_ref, w_hbm, y_ref, *ring = refs
  height, part = tiles.height, tiles.part
  strip, i = pl.program_id(1), pl.program_id(2)
  items = pl.num_programs(2)
  e, groups = group[i], w_hbm.shape[0]
  weights = _Ring(
    w_hbm, *ring, order, begin, ordinal[groups], pl.num_programs(1),
    tiles.chunk, transpose_w,
  )  # fmt: skip
  visit = strip * weights.visits + ordinal[e]
  begins = (strip == 0) & (i == 0)
  live = e < groups
  arrives = live & ((i == 0) | (group[jnp.maximum(i - 1, 0)] != e))
  low, high = (offsets[e + n] - tile[i] * height for n in (0, 1))
  whole = live & (low <= 0) & (high >= height) & ~begins

  def dot(at, size, start, width, *, masked: bool):
    """y[at, start] = x[at] w[start], only the rows of the group if masked."""
    here = (pl.ds(at, size), pl.ds(start, width))
    slot = lax.rem(visit, tiles.depth)
    y = lax.dot_general(
      x_ref[here[0], :],
      weights.columns(weights.vmem, slot, start, width)[...],
      (((1,), (1 if transpose_w else 0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    if masked:
      mine = between(low - at, high - at, y.shape)
      y = jnp.where(mine, y, y_ref[here].astype(jnp.float32))
    y_ref[here] = y.astype(y_ref.dtype)

  def dots(at, size, *, masked: bool):
    loop(
      tiles.width // tiles.piece,
      lambda n: dot(
        at, size, pl.multiple_of(n * tiles.piece, tiles.chunk), tiles.piece,
        masked=masked,
      ),
    )  # fmt: skip

  if gather:
    half = height // 2
    pick = lambda place, n, unroll: _pick_rows(
      rows, place * height + n * half, kept, x_ref, n * half, half, unroll
    )
    following = tile[jnp.where(i + 1 < items, i + 1, 0)]
    opens = (i == 0) | (tile[jnp.maximum(i - 1, 0)] != tile[i])
    closes = (i + 1 == items) | (following != tile[i])

  @pl.when(begins)
  def start():
    weights.started[0] = 0
    if gather:  # the first chunk before all rows, the others after them
      weights.start(jnp.minimum(weights.visits, 1))
      _keep_rows(x_hbm, kept, slabs, slab_sems)
      pick(tile[i], 0, False)

  weights.advance(visit, strip * items + i, items)

  if gather:
    pl.when(opens & ~whole)(lambda: pick(tile[i], 1, False))

  @pl.when(begins & live)
  def as_weights_arrive():
    @pl.loop(0, weights.chunks)
    def _(n):
      weights.copy(n).wait()
      start = pl.multiple_of(n * tiles.chunk, tiles.chunk)
      dot(0, height, start, tiles.chunk, masked=True)

  @pl.when(arrives & ~begins)
  def wait():
    for n in range(weights.chunks):
      weights.copy(visit * weights.chunks + n).wait()

  @pl.when(whole)
  def all_rows():
    if gather:  # in one block with the matmul, whose free slots it takes
      pick(tile[i], 1, True)
      dots(0, half, masked=False)
      pick(following, 0, True)
      dots(half, half, masked=False)
    else:
      dots(0, height, masked=False)

  @pl.when(live & ~whole & ~begins)
  def some_rows():
    @pl.loop(0, height // part)
    def _(n):
      at = pl.multiple_of(n * part, part)
      pl.when((low < at + part) & (high > at))(
        lambda: dots(at, part, masked=True)
      )

  @pl.when(~live)
  def nobodys_rows():
    @pl.loop(0, height // part)
    def _(n):
      here = pl.ds(pl.multiple_of(n * part, part), part)
      old = y_ref[here, :].astype(jnp.float32)
      dead = between(low - n * part, high, old.shape)
      y_ref[here, :] = jnp.where(dead, 0, old).astype(y_ref.dtype)

  if gather:
    pl.when(closes & ~whole)(lambda: pick(following, 0, False))


def between(low: Any, high: Any, shape: tuple[int, ...]) -> jax.Array:
  """Which rows of an array are `low .. high - 1`."""
  row = lax.broadcasted_iota(jnp.int32, shape, 0)
  return (row >= low) & (row < high)


def loop(count: int, body: Callable[[Any], None]) -> None:
  """`body(n)` for n < count, without a loop if that is 1."""
  if count == 1:
    body(0)
  else:
    pl.loop(0, count)(body)


def _keep_rows(x_hbm: Any, kept: Any, slabs: Any, sems: Any) -> None:
  """Reads all of x, [T, K], into `kept`, f32[T, K], a slab at a time."""
  size = slabs.shape[1]
  count = len(range(0, kept.shape[0], size))

  def copy(n):
    at = pl.multiple_of(n * size, size)
    slot = lax.rem(n, 2)
    return pltpu.make_async_copy(
      x_hbm.at[pl.ds(at, size), :], slabs.at[slot], sems.at[slot]
    )

  copy(0).start()

  @pl.loop(0, count)
  def _(n):
    pl.when(n + 1 < count)(lambda: copy(n + 1).start())
    copy(n).wait()
    here = pl.ds(pl.multiple_of(n * size, size), size)
    kept[here, :] = slabs[lax.rem(n, 2)].astype(kept.dtype)


def _pick_rows(
  rows: Any, place: Any, kept: Any, out: Any, at: int, count: int, unroll: bool
) -> None:
  """out[at + n] = kept[rows[place + n]] for n < count; `at` is static.

  Two rows of bf16 make a row of words: the first is the lower half of each.
  """
  bits, words = kept.bitcast(jnp.uint32), out.bitcast(jnp.uint32)
  pack = 4 // out.dtype.itemsize

  def put(n):
    row = lambda k: bits[pl.ds(rows[place + n * pack + k], 1), :]
    word = row(0)
    if pack == 2:
      low = lax.shift_right_logical(word, jnp.uint32(16))
      word = low | (row(1) & jnp.uint32(0xFFFF0000))
    words[pl.ds(at // pack + n, 1), :] = word

  count //= pack
  step = count if unroll else math.gcd(count, 8)

  def puts(n):
    for k in range(step):
      put(n * step + k)

  loop(count // step, puts)
