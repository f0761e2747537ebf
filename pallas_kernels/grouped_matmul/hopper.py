# SPDX-License-Identifier: Apache-2.0
"""What the products of `gpu.py` share: how a Hopper GPU is kept busy.

One thread block for each multiprocessor walks over tiles of the product.  Its
last warp group only loads (TMA) into a ring of `stages` slots, and so runs
ahead into the next tile; the other two multiply (wgmma), each its half of the
rows of the tile, and store.  Steps are numbered through all tiles: step t lies
in slot t mod stages.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.grouped_matmul.groups import BLOCK
from pallas_kernels.mosaic_gpu import kernel

SHARED_MEMORY = 232_448  # bytes that one thread block may have
# Shared memory holds operands in blocks of 8 rows x 64 features (128 bytes), as
# wgmma wants them; a load starts at a multiple of a block.
WIDTH = 64
MULTIPLIERS = 2  # warp groups that multiply
# Each lane of the three warp groups shares 512 registers: 2 x 232 + 40.
MULTIPLY_REGISTERS, LOAD_REGISTERS = 232, 40


class Tile(NamedTuple):
  """What a thread block makes at a time (static).

  `rows` x `columns` of the product, in steps of `depth` of its contraction, of
  which `stages` lie in shared memory.
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
    out = 2 * self.rows * WIDTH
    barriers = (2 * self.stages + 1) * 8
    return 2 * (self.stages * step + out) + barriers

  def check(self) -> None:
    """Refuses a tile that cannot be; ValueError."""
    fits = (
      self.rows % 128 == 0
      and self.columns % 128 == 0
      and 0 < self.half * self.columns <= 64 * 256
      and self.columns <= 256
      and self.depth % WIDTH == 0
      and self.stages >= 2
      and self.shared_memory <= SHARED_MEMORY
    )
    if not fits:
      raise ValueError(
        f"{self} cannot be: rows and columns (256 at most) must be multiples of"
        f" 128, rows x columns at most 128 x 256, depth a multiple of {WIDTH},"
        f" stages at least 2, and {self.shared_memory:,} bytes of shared memory"
        f" at most {SHARED_MEMORY:,}."
      )


def default_tile(columns: int) -> Tile:
  """The tile of a product of so many columns."""
  return Tile() if columns > 128 else Tile(columns=128, stages=6)


class Scratch(NamedTuple):
  """References to what a thread block holds."""

  a: Any  # [stages, ...] the ring of the first operand
  b: Any  # and of the second
  out: Any  # [2, 2, half, 64] two buffers of each multiplying warp group
  full: Any  # [stages] barriers: the slot is loaded
  free: Any  # [stages] barriers: the slot is used up
  both: Any  # barrier at which the multiplying warp groups meet


class Product(NamedTuple):
  """What differs between products, all of it traced inside the kernel.

  A `work` describes one tile: a pytree of i32 scalars, among them the number
  of its `steps`.  `step` counts from 0 in each tile.
  """

  describe: Callable[[Array], Any]  # number of the tile -> work
  load: Callable[[Any, Array, Array], None]  # work, step, slot
  multiply: Callable[[Any, Any, Array, Array], None]  # acc, work, step, slot
  store: Callable[[Any, Array], None]  # work, f32[half, columns]
  busy: Callable[[Any], Array | bool]  # work -> has this warp group rows of it?


def walk(product: Product, tiles: Any, tile: Tile, scratch: Scratch) -> None:
  """Makes every tile whose number is this block's modulo the blocks."""
  block, blocks = lax.axis_index("block"), lax.axis_size("block")
  mine = lax.div(tiles - block + blocks - 1, blocks)

  def work_of(j):
    return product.describe(jnp.minimum(block + j * blocks, tiles - 1))

  def each(make):
    """Calls `make(t, work)`; the next description is read meanwhile."""

    def one(j, carry):
      (t, work), following = carry, work_of(j + 1)
      make(product, tile, scratch, t, work)
      return t + work.steps, following

    return lax.fori_loop(0, mine, one, (jnp.int32(0), work_of(0)))[0]

  @pl.when(lax.axis_index("wg") == MULTIPLIERS)
  def loading():
    plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
    steps = each(_load)

    @pl.loop(jnp.maximum(steps - tile.stages, 0), steps)
    def used_up(t):
      plgpu.barrier_wait(scratch.free.at[lax.rem(t, tile.stages)])

  @pl.when(lax.axis_index("wg") < MULTIPLIERS)
  def multiplying():
    plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
    each(_multiply)
    plgpu.wait_smem_to_gmem(0)


def _load(
  product: Product, tile: Tile, scratch: Scratch, t: Array, work: Any
) -> None:
  """Loads the steps of a tile, the first of which is step t of all."""

  @pl.loop(0, work.steps)
  def one(step):
    slot = lax.rem(t + step, tile.stages)

    @pl.when(t + step >= tile.stages)
    def used_up():
      plgpu.barrier_wait(scratch.free.at[slot])

    product.load(work, step, slot)


def _multiply(
  product: Product, tile: Tile, scratch: Scratch, t: Array, work: Any
) -> None:
  """Multiplies the steps of a tile and stores it."""
  slot_of = lambda step: lax.rem(t + step, tile.stages)
  release = lambda step: plgpu.barrier_arrive(scratch.free.at[slot_of(step)])
  busy = product.busy(work)

  def accumulate(acc):
    @pl.loop(0, work.steps)
    def one(step):
      plgpu.barrier_wait(scratch.full.at[slot_of(step)])
      product.multiply(acc, work, step, slot_of(step))
      plgpu.wgmma_wait(1)  # all but this step are done
      pl.when(step > 0)(lambda: release(step - 1))

    plgpu.wgmma_wait(0)
    pl.when(work.steps > 0)(lambda: release(work.steps - 1))
    return acc[...]

  @pl.when(busy)
  def make():
    acc = plgpu.ACC((tile.half, tile.columns))
    product.store(work, pl.run_scoped(accumulate, acc))

  @pl.when(jnp.logical_not(busy))
  def skip():
    @pl.loop(0, work.steps)
    def one(step):
      plgpu.barrier_wait(scratch.full.at[slot_of(step)])
      release(step)


def store(
  y: Array,
  to: Any,
  row: Array,
  column: Array,
  out: Any,
  low: Array | int = 0,
  high: Array | int | None = None,
) -> None:
  """Stores rows `low:high` of y, [half, columns], to `to` at (row, column).

  The size of a copy is static: half, half/2, .. or 1 rows, those that add up.
  """
  half, columns = y.shape
  count = (half if high is None else high) - low
  mine = out.at[lax.axis_index("wg")]
  for i in range(columns // WIDTH):
    part, here = mine.at[i % 2], pl.ds(column + i * WIDTH, WIDTH)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    part[...] = y[:, i * WIDTH : (i + 1) * WIDTH]
    plgpu.commit_smem()
    first, size = low, half
    while size:

      @pl.when(count & size != 0)
      def copy(first=first, size=size, part=part, here=here):
        there = to.at[pl.ds(row + first, size), here]
        rows = part.at[pl.ds(first, size)]
        plgpu.copy_smem_to_gmem(rows, there, commit_group=False)

      first, size = first + (count & size), size // 2
    plgpu.commit_smem_to_gmem_group()


def launch(
  body: Callable[..., None],
  out: jax.ShapeDtypeStruct,
  operands: tuple[tuple[int, int], tuple[int, int]],
  tile: Tile,
  *,
  name: str,
  num_sms: int,
  interpret: Any,
  cost: pl.CostEstimate,
) -> Callable[..., Array]:
  """A function of arrays that runs `body(*inputs, output, scratch)`.

  `operands`: the shapes of both operands of a step in shared memory.
  """

  def shared(block, *shape):
    blocks = plgpu.TilingTransform((block, WIDTH))
    swizzle = plgpu.SwizzleTransform(2 * WIDTH)
    return plgpu.SMEM(shape, out.dtype, transforms=(blocks, swizzle))

  a, b = operands
  return kernel(
    lambda *refs, **scratch: body(*refs, Scratch(**scratch)),
    out_type=out,
    grid=(num_sms,),
    grid_names=("block",),
    num_threads=MULTIPLIERS + 1,
    thread_name="wg",
    scratch_types=Scratch(
      a=shared(BLOCK, tile.stages, *a),
      b=shared(BLOCK, tile.stages, *b),
      out=shared(1, MULTIPLIERS, 2, tile.half, WIDTH),  # rows start anywhere
      full=plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
      free=plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=tile.stages),
      both=plgpu.Barrier(num_arrivals=MULTIPLIERS),
    )._asdict(),
    cost_estimate=cost,
    kernel_name=name,
    interpret=interpret,
  )
