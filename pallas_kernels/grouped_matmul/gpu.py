# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul on Hopper GPUs: row m of x times the weights of its group.

    y_m = x_m w[e(m)],    dw[e] = sum over the rows m of group e of x_m^T dy_m

The rows lie sorted by group, `sizes[e]` of them for group e; the sizes are data.
No tile holds rows of two groups, so the work is that of a dense product plus at
most one tile of rows for each group.

One thread block for each multiprocessor walks the tiles.  Its third warp group
only loads (TMA), `stages` steps ahead and on into the next tile; the other two
multiply (wgmma), each its half of the tile's rows, and store.  A half without
rows of the group is not multiplied.  A tile in shared memory is made of blocks
of eight rows, hence loads start at multiples of eight: the rows that a tile so
catches from the group before are computed and not stored, or, in dw, zeroed.

Needs jax >= 0.12 (Mosaic GPU).  Runs in its interpreter on any machine:
`interpret=plgpu.InterpretGPUParams()`.

Axes: M rows (slots), T tokens, E groups, K features in, N features out.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

H100_SMS = 132
SHARED_MEMORY = 232_448  # bytes that one block may have
BLOCK = 8  # rows of a block in shared memory; loads start at its multiples
SWIZZLE = 64  # features of a block: 128 bytes
MULTIPLIERS = 2  # warp groups that multiply; one more loads
# 2 x 232 + 40 of the 512 registers that three warp groups share per lane.
MULTIPLY_REGISTERS, LOAD_REGISTERS = 232, 40


class Tile(NamedTuple):
  """What a thread block makes at a time (static).

  `rows` x `columns` of a product, in steps of `depth` of its contraction, with
  `stages` steps in shared memory.
  """

  rows: int = 128
  columns: int = 256
  depth: int = 64
  stages: int = 4

  @property
  def half(self) -> int:
    """Rows of one multiplying warp group."""
    return self.rows // MULTIPLIERS

  @property
  def shared_memory(self) -> int:
    """Bytes of shared memory."""
    step = (self.rows + self.columns) * self.depth
    out = 2 * self.rows * SWIZZLE
    barriers = (2 * self.stages + 1) * 8
    return 2 * (self.stages * step + out) + barriers


class How(NamedTuple):
  """The static arguments of a product."""

  transpose_w: bool
  tile: Tile
  num_sms: int
  interpret: Any


def grouped_matmul(
  x: Float[Array, "T K"],
  w: Float[Array, "E K N"] | Float[Array, "E N K"],
  sizes: Int[Array, " E"],
  *,
  rows: Int[Array, " M"] | None = None,
  transpose_w: bool = False,
  tile: Tile = Tile(),
  num_sms: int = H100_SMS,
  interpret: Any = None,
) -> Float[Array, "M N"]:
  """Multiplies each row by the weights of its group; differentiable in x and w.

  Args:
    x: bfloat16 or float16 rows sorted by group, T = M; with `rows`, in any
      order.
    w: of the dtype of x; `[E, N, K]` if `transpose_w`.
    sizes: rows of each group, in order (dynamic).  Rows past their sum are
      nobody's: they give 0 and their values, NaN included, reach nothing.
    rows: slot m reads row `rows[m]` of x (a gather before the kernel).
    tile: see `Tile`.
    num_sms: multiprocessors of the GPU: the number of thread blocks.
    interpret: `plgpu.InterpretGPUParams()` runs the kernel on the CPU.

  Returns:
    The products, summed in float32, in the dtype of x.

  Raises:
    ValueError: shapes, dtypes or tile that the kernel cannot do.
    NotImplementedError: jax is older than 0.12.
  """
  how = How(transpose_w, tile, num_sms, interpret)
  inner, outer = (2, 1) if transpose_w else (1, 2)
  _check(x, w, sizes, tile)
  if w.shape[inner] != x.shape[1]:
    raise ValueError(
      f"{x.shape=} and {w.shape=} do not fit with {transpose_w=}: axis"
      f" {inner} of `w` must be the features of `x`."
    )
  if rows is not None:
    x = x.at[rows].get(mode="clip")
  if not (len(x) and x.shape[1] and w.shape[outer]):
    return jnp.zeros((len(x), w.shape[outer]), x.dtype)
  return _product(x, w, sizes.astype(jnp.int32), how)


def grouped_matmul_dw(
  x: Float[Array, "M K"],
  dy: Float[Array, "M N"],
  sizes: Int[Array, " E"],
  *,
  tile: Tile = Tile(),
  num_sms: int = H100_SMS,
  interpret: Any = None,
) -> Float[Array, "E K N"]:
  """The gradient of the weights, dw[e] = x_e^T dy_e; 0 for an empty group.

  Arguments and errors as in `grouped_matmul`.  Not differentiable.
  """
  _check(x, dy, sizes, tile)
  if len(x) != len(dy):
    raise ValueError(f"{x.shape=} and {dy.shape=} need as many rows.")
  if not (len(x) and x.shape[1] and dy.shape[1]):
    return jnp.zeros((len(sizes), x.shape[1], dy.shape[1]), x.dtype)
  return _dw(x, dy, sizes.astype(jnp.int32), How(False, tile, num_sms, interpret))


def _check(x: Array, other: Array, sizes: Array, tile: Tile) -> None:
  """Refuses what the kernels cannot do, in words."""
  if jax.__version_info__ < (0, 12):
    raise NotImplementedError(
      f"the GPU kernel needs jax >= 0.12 and this is {jax.__version__}: use the"
      " reference, or Python 3.12 with a newer jax."
    )
  if x.dtype not in (jnp.bfloat16, jnp.float16) or other.dtype != x.dtype:
    raise ValueError(
      f"{x.dtype} with {other.dtype}: both operands must be bfloat16 or both"
      " float16; cast them, or use the reference."
    )
  features = x.shape[1:] + other.shape[1:]
  if any(n % SWIZZLE for n in features):
    raise ValueError(
      f"features {features} must be multiples of {SWIZZLE}: pad them with"
      " zeros, or use the reference."
    )
  if other.ndim == 3 and len(other) != len(sizes):
    raise ValueError(f"{other.shape=} needs a size for each group, {sizes.shape=}.")
  fits = (
    tile.rows % 128 == 0
    and tile.columns % 128 == 0
    and tile.columns <= 256
    and tile.depth % SWIZZLE == 0
    and tile.stages >= 2
    and tile.shared_memory <= SHARED_MEMORY
  )
  if not fits:
    raise ValueError(
      f"{tile} needs {tile.shared_memory:,} bytes of shared memory and there are"
      f" {SHARED_MEMORY:,}; rows and columns (at most 256) must be multiples of"
      " 128, depth of 64, and stages at least 2."
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: Array, w: Array, sizes: Array, how: How) -> Array:
  return _forward(x, w, sizes, how)


def _product_fwd(x, w, sizes, how):
  return _forward(x, w, sizes, how), (x, w, sizes)


def _product_bwd(how, saved, dy):
  x, w, sizes = saved
  dx = _forward(dy, w, sizes, how._replace(transpose_w=not how.transpose_w))
  dw = _dw(dy, x, sizes, how) if how.transpose_w else _dw(x, dy, sizes, how)
  return dx, dw, np.zeros(sizes.shape, jax.dtypes.float0)


_product.defvjp(_product_fwd, _product_bwd)


class Plan(NamedTuple):
  """The tiles of rows: tile t makes rows `low[t]:high[t]` of `group[t]`.

  It starts at the multiple of eight at or below `low[t]`.  Group E: nobody's.
  Only the first `count[0]` tiles count.
  """

  group: Int[Array, " tiles"]
  low: Int[Array, " tiles"]
  high: Int[Array, " tiles"]
  count: Int[Array, " 1"]


def _borders(sizes: Array, m: int) -> tuple[Array, Array]:
  """First row and end of each group."""
  ends = jnp.minimum(jnp.cumsum(sizes), m)
  return jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]]), ends


def _plan(sizes: Int[Array, " E"], m: int, rows: int) -> Plan:
  """Cuts the `m` rows into tiles of at most `rows`, none with two groups."""
  starts, ends = _borders(jnp.append(sizes, m), m)
  bases = starts - starts % BLOCK
  tiles = jnp.where(ends > starts, (ends - bases + rows - 1) // rows, 0)
  last = jnp.cumsum(tiles)
  count = len(sizes) + 1
  t = jnp.arange(pl.cdiv(m + count * (BLOCK - 1), rows) + count - 1)
  group = (t[:, None] >= last).sum(1, dtype=jnp.int32)
  group = jnp.minimum(group, count - 1)
  base = bases[group] + (t - (last - tiles)[group]) * rows
  low = jnp.maximum(base, starts[group])
  high = jnp.minimum(base + rows, ends[group])
  return Plan(group, low, high, last[-1:])


class Work(NamedTuple):
  """One tile of a product, in the kernel: i32 scalars."""

  group: Array
  low: Array  # the rows low:high of the group; those of the tile, or in dw all
  high: Array
  across: Array  # which columns of the product, in tiles
  down: Array  # dw only: which rows of dw, in tiles
  steps: Array  # of its contraction


def _block(row: Array) -> Array:
  """The first row of the block of eight that holds `row`."""
  return lax.div(row, jnp.int32(BLOCK)) * BLOCK


def _walk(
  items: Array | int,
  describe: Callable[[Array], Work],
  load: Callable[[Work, Array, Array], None],
  multiply: Callable[[Any, Work, Array, Array], None],
  store: Callable[[Work, Array], None],
  busy: Callable[[Work], Array | bool],
  tile: Tile,
  full: Any,
  free: Any,
) -> None:
  """Walks over this block's items: the ring between loading and multiplying.

  Steps are numbered through all items; step t lies in slot t mod stages.
  `full[slot]` tells that it is loaded, `free[slot]` that it is used up.
  """
  warp_group = lax.axis_index("wg")
  block, blocks = lax.axis_index("block"), lax.axis_size("block")
  mine = lax.div(items - block + blocks - 1, blocks)
  slot_of = lambda t: lax.rem(t, tile.stages)
  item = lambda j: describe(jnp.minimum(block + j * blocks, items - 1))

  @pl.when(warp_group == MULTIPLIERS)
  def loading():
    plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

    def one(j, carry):
      (t, work), following = carry, item(j + 1)

      def step(s, t):
        @pl.when(t >= tile.stages)
        def wait():
          plgpu.barrier_wait(free.at[slot_of(t)])

        load(work, s, slot_of(t))
        return t + 1

      return lax.fori_loop(0, work.steps, step, t), following

    done, _ = lax.fori_loop(0, mine, one, (jnp.int32(0), item(0)))

    @pl.loop(jnp.maximum(done - tile.stages, 0), done)
    def drain(t):
      plgpu.barrier_wait(free.at[slot_of(t)])

  @pl.when(warp_group < MULTIPLIERS)
  def multiplying():
    plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")

    def one(j, carry):
      (t, work), following = carry, item(j + 1)

      @pl.when(busy(work))
      def make():
        def accumulate(acc):
          def step(s, t):
            plgpu.barrier_wait(full.at[slot_of(t)])
            multiply(acc, work, s, slot_of(t))
            plgpu.wgmma_wait(1)  # the step before is used up

            @pl.when(s > 0)
            def release():
              plgpu.barrier_arrive(free.at[slot_of(t + tile.stages - 1)])

            return t + 1

          end = lax.fori_loop(0, work.steps, step, t)
          plgpu.wgmma_wait(0)

          @pl.when(work.steps > 0)
          def release():
            plgpu.barrier_arrive(free.at[slot_of(end + tile.stages - 1)])

          return acc[...]

        store(
          work,
          pl.run_scoped(accumulate, plgpu.ACC((tile.half, tile.columns))),
        )

      @pl.when(jnp.logical_not(busy(work)))
      def skip():
        @pl.loop(t, t + work.steps)
        def step(t):
          plgpu.barrier_wait(full.at[slot_of(t)])
          plgpu.barrier_arrive(free.at[slot_of(t)])

      return t + work.steps, following

    lax.fori_loop(0, mine, one, (jnp.int32(0), item(0)))
    plgpu.wait_smem_to_gmem(0)


def _forward(x: Array, w: Array, sizes: Array, how: How) -> Array:
  """`grouped_matmul` without its gather."""
  (m, k), tile = x.shape, how.tile
  n = w.shape[1 if how.transpose_w else 2]
  x = _whole_blocks(x)
  plan = _plan(sizes, len(x), tile.rows)
  column_tiles = pl.cdiv(n, tile.columns)
  # Neighbours in time share weights and rows in the second-level cache.
  band = max(d for d in range(1, 9) if column_tiles % d == 0)
  w_tile = (tile.columns, tile.depth)
  w_tile = w_tile if how.transpose_w else w_tile[::-1]

  def kernel(
    group_ref, low_ref, high_ref, count_ref, x_ref, w_ref, y_ref, **scratch
  ):
    """x: [M, K], w: [E, K, N] or [E, N, K], y: [M, N] in global memory."""
    x_smem, w_smem = scratch["a"], scratch["b"]
    warp_group = lax.axis_index("wg")
    half, count = tile.half, count_ref[0]

    def describe(i):
      across = lax.div(i, count * band)
      i = i - across * count * band
      t = lax.div(i, band)
      group = group_ref[t]
      return Work(
        group=group,
        low=low_ref[t],
        high=high_ref[t],
        across=across * band + i - t * band,
        down=jnp.int32(0),
        steps=jnp.where(group < len(sizes), k // tile.depth, 0),
      )

    def load(work, step, slot):
      deep = pl.ds(step * tile.depth, tile.depth)
      wide = pl.ds(work.across * tile.columns, tile.columns)
      across = (wide, deep) if how.transpose_w else (deep, wide)
      ready = scratch["full"].at[slot]
      plgpu.copy_gmem_to_smem(
        x_ref.at[pl.ds(_block(work.low), tile.rows), deep],
        x_smem.at[slot],
        ready,
      )
      plgpu.copy_gmem_to_smem(
        w_ref.at[work.group, *across], w_smem.at[slot], ready
      )

    def multiply(acc, work, step, slot):
      b = w_smem.at[slot]
      plgpu.wgmma(
        acc,
        x_smem.at[slot, pl.ds(warp_group * half, half)],
        b.transpose((1, 0)) if how.transpose_w else b,
      )

    def mine(work):
      """The first row of this warp group, and which of its rows it stores."""
      row = _block(work.low) + warp_group * half
      return row, *(jnp.clip(r - row, 0, half) for r in (work.low, work.high))

    def busy(work):
      _, low, high = mine(work)
      return low < high

    def store(work, y):
      row, low, high = mine(work)
      column = work.across * tile.columns
      y = y.astype(x.dtype)
      _store(y, y_ref, row, column, scratch["out"], low, high)

    _walk(
      count * column_tiles, describe, load, multiply, store, busy, tile,
      scratch["full"], scratch["free"],
    )

  out = jax.ShapeDtypeStruct((len(x), n), x.dtype)
  run = _kernel(kernel, out, (tile.rows, tile.depth), w_tile, how)
  return run(*plan, x, w)[:m]


def _dw(x: Array, dy: Array, sizes: Array, how: How) -> Array:
  """`grouped_matmul_dw`: the contraction runs over the rows of a group."""
  (_, k), (_, n), tile = x.shape, dy.shape, how.tile
  x, dy = _whole_blocks(x), _whole_blocks(dy)
  borders = _borders(sizes, len(x))
  down, across = pl.cdiv(k, tile.rows), pl.cdiv(n, tile.columns)

  def kernel(start_ref, end_ref, x_ref, dy_ref, dw_ref, **scratch):
    """x: [M, K], dy: [M, N], dw: [E, K, N] in global memory."""
    x_smem, dy_smem = scratch["a"], scratch["b"]
    warp_group = lax.axis_index("wg")
    half = tile.half

    def describe(i):
      group = lax.div(i, down * across)
      i = i - group * down * across
      row = lax.div(i, across)
      low, high = start_ref[group], end_ref[group]
      steps = lax.div(high - _block(low) + tile.depth - 1, tile.depth)
      return Work(
        group=group,
        low=low,
        high=high,
        across=i - row * across,
        down=row,
        steps=jnp.where(high > low, steps, 0),
      )

    def load(work, step, slot):
      deep = pl.ds(_block(work.low) + step * tile.depth, tile.depth)
      tall = pl.ds(work.down * tile.rows, tile.rows)
      wide = pl.ds(work.across * tile.columns, tile.columns)
      ready = scratch["full"].at[slot]
      plgpu.copy_gmem_to_smem(x_ref.at[deep, tall], x_smem.at[slot], ready)
      plgpu.copy_gmem_to_smem(dy_ref.at[deep, wide], dy_smem.at[slot], ready)

    def multiply(acc, work, step, slot):
      first = _block(work.low) + step * tile.depth
      low, high = work.low - first, work.high - first

      @pl.when((low > 0) | (high < tile.depth))
      def zero_the_rows_of_others():
        """Each warp group its own part of x and half of dy."""
        parts = (x_smem, tile.rows), (dy_smem, tile.columns)
        row = plgpu.broadcasted_iota(
          jnp.int32, (tile.depth, SWIZZLE), 0, layout=plgpu.Layout.WGMMA
        )
        keep = (row >= low) & (row < high)
        for smem, width in parts:
          for i in range(width // MULTIPLIERS // SWIZZLE):
            column = warp_group * (width // MULTIPLIERS) + i * SWIZZLE
            part = smem.at[slot, :, pl.ds(column, SWIZZLE)]
            part[...] = jnp.where(keep, part[...], jnp.zeros((), x.dtype))
        plgpu.commit_smem()
        plgpu.barrier_arrive_and_wait(scratch["both"])

      a = x_smem.at[slot, :, pl.ds(warp_group * half, half)]
      plgpu.wgmma(acc, a.transpose((1, 0)), dy_smem.at[slot])

    def store(work, dw):
      to, dw = dw_ref.at[work.group], dw.astype(x.dtype)
      row = work.down * tile.rows + warp_group * half
      _store(dw, to, row, work.across * tile.columns, scratch["out"])

    _walk(
      len(sizes) * down * across, describe, load, multiply, store,
      lambda work: True, tile, scratch["full"], scratch["free"],
    )

  out = jax.ShapeDtypeStruct((len(sizes), k, n), x.dtype)
  a, b = (tile.depth, tile.rows), (tile.depth, tile.columns)
  return _kernel(kernel, out, a, b, how)(*borders, x, dy)


def _whole_blocks(x: Array) -> Array:
  """Pads the rows to a multiple of eight."""
  more = -len(x) % BLOCK
  return jnp.pad(x, ((0, more), (0, 0))) if more else x


def _store(
  y: Array,
  to: Any,
  row: Array,
  column: Array,
  smem: Any,
  low: Array | int = 0,
  high: Array | int | None = None,
) -> None:
  """Stores rows `low:high` of y, f[half, columns], by two buffers in turn.

  The size of a copy is static: as many of half, half/2, .. 1 rows as needed.
  """
  half, columns = y.shape
  count = (half if high is None else high) - low
  mine = smem.at[lax.axis_index("wg")]
  for i in range(columns // SWIZZLE):
    part = mine.at[i % 2]
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    part[...] = y[:, i * SWIZZLE : (i + 1) * SWIZZLE]
    plgpu.commit_smem()
    first, size = low, half
    while size:

      @pl.when(count & size != 0)
      def copy(first=first, size=size, part=part, i=i):
        here = pl.ds(row + first, size), pl.ds(column + i * SWIZZLE, SWIZZLE)
        plgpu.copy_smem_to_gmem(
          part.at[pl.ds(first, size)], to.at[*here], commit_group=False
        )

      first, size = first + (count & size), size // 2
    plgpu.commit_smem_to_gmem_group()


def _kernel(
  body: Callable[..., None],
  out: jax.ShapeDtypeStruct,
  a: tuple[int, int],
  b: tuple[int, int],
  how: How,
) -> Callable[..., Array]:
  """The launch: one block for each multiprocessor, three warp groups in each.

  `a`, `b`: shapes of the operands of one step in shared memory.
  """
  tile, dtype = how.tile, out.dtype
  shared = lambda block, *shape: plgpu.SMEM(
    shape,
    dtype,
    transforms=(
      plgpu.TilingTransform((block, SWIZZLE)),
      plgpu.SwizzleTransform(2 * SWIZZLE),
    ),
  )
  return plgpu.kernel(
    body,
    out_type=out,
    grid=(how.num_sms,),
    grid_names=("block",),
    num_threads=MULTIPLIERS + 1,
    thread_name="wg",
    scratch_types={
      "a": shared(BLOCK, tile.stages, *a),
      "b": shared(BLOCK, tile.stages, *b),
      "out": shared(1, MULTIPLIERS, 2, tile.half, SWIZZLE),
      "full": plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
      "free": plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=tile.stages),
      "both": plgpu.Barrier(num_arrivals=MULTIPLIERS),
    },
    interpret=how.interpret,
  )
