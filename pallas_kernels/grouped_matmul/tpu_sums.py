# SPDX-License-Identifier: Apache-2.0
"""The gradient of the weights on TPU: z_e = sum of x_m^T dy_m, m of group e.

The sums of a group, f32[K, tn], stay in VMEM, with tn as wide as fits: rows are
read once where they can be.  The sums of one group leave, rounded, in the very
block of the schedule in which those of the next overwrite them, since vector
stores have slots to spare there.  They go to memory during the items of that
group, chunk by chunk, so that rows need not wait behind them.  Only tiles with
a border inside are masked, part by part.  An empty group has an item
without rows, and leaves zeros.

Axes: M rows, K features of x, N features of dy, E groups; tm height of a tile,
tn width of a strip.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.launch import between, launch, loop
from pallas_kernels.grouped_matmul.tuned import Tiles
from pallas_kernels.grouped_matmul.work import Work
from pallas_kernels.varying import result


def multiply_sums(
  x: jax.Array,
  dy: jax.Array,
  work: Work,
  *,
  tiles: Tiles,
  interpret: Any,
  debug: bool,
) -> jax.Array:
  """z[E, K, N] of x[M, K] and dy[M, N]; `tiles` must divide all sizes.

  `work` lists the items of a sum over rows, of tiles of `tiles.height`.
  """
  count, *lists = work
  (rows, features), columns = x.shape, dy.shape[1]
  groups = len(work.order)
  height, width = tiles.height, tiles.width
  strips = columns // width // tiles.cores
  reads = features * strips * tiles.cores + columns
  return launch(
    functools.partial(_kernel, tiles=tiles),
    "grouped_matmul_sums",
    result((groups, features, columns), x.dtype, x, dy, *lists),
    lists,
    (x, dy),
    grid=(tiles.cores, strips, count),
    in_specs=[
      pl.BlockSpec(
        (height, features), lambda c, s, i, _, tile, *__: (tile[i], 0)
      ),
      pl.BlockSpec(
        (height, width),
        lambda c, s, i, _, tile, *__: (tile[i], c * strips + s),
      ),
    ],
    out_specs=pl.BlockSpec(memory_space=pl.ANY),
    scratch_shapes=[
      pltpu.VMEM((features, width), jnp.float32),
      pltpu.VMEM((2, features, width), x.dtype),
      pltpu.SemaphoreType.DMA((2, width // tiles.chunk)),
      pltpu.SMEM((1,), jnp.int32),
    ],
    tiles=tiles,
    flops=2 * rows * features * columns,
    moved=rows * reads + groups * features * columns,
    interpret=interpret,
    debug=debug,
  )


def _kernel(
  group, tile, offsets, ordinal, order, begin,
  x_ref, dy_ref, z_hbm, sum_ref, out_ref, sems, sent, *, tiles: Tiles,
):  # fmt: skip
  """One item: a tile of rows and a group, times a strip of columns.

  Scalars in SMEM, the lists of `Work` from `group` on.
  In: x, [tm, K]; dy, [tm, tn], in VMEM.  Out: z, [E, K, N], in HBM.
  Scratch: sums, f32[K, tn]; those of the two groups before, on their way out,
  [2, K, tn]; their semaphores, [2, tn / chunk]; chunks of the group before sent
  so far, i32[1].
  """
  del ordinal, order
  height, part, width, piece = (
    tiles.height,
    tiles.part,
    tiles.width,
    tiles.piece,
  )
  chunk, chunks = tiles.chunk, tiles.width // tiles.chunk
  core, strip, i = (pl.program_id(n) for n in range(3))
  strips, items = pl.num_programs(1), pl.num_programs(2)
  e, groups = group[i], z_hbm.shape[0]
  visit = strip * groups + e  # every group has items
  arrives = (i == 0) | (group[jnp.maximum(i - 1, 0)] != e)
  leaves = arrives & (visit > 0)
  low, high = (offsets[e + n] - tile[i] * height for n in (0, 1))
  whole = (low <= 0) & (high >= height)
  pieces = functools.partial(loop, width // piece)

  def at(n):
    return pl.ds(pl.multiple_of(n * piece, piece), piece)

  def copy(n, visit):
    strip, slot = lax.div(visit, groups), lax.rem(visit, 2)
    here = pl.multiple_of(n * chunk, chunk)
    there = pl.multiple_of((core * strips + strip) * width + here, chunk)
    return pltpu.make_async_copy(
      out_ref.at[slot, :, pl.ds(here, chunk)],
      z_hbm.at[visit - strip * groups, :, pl.ds(there, chunk)],
      sems.at[slot, n],
    )

  def leave(n, visit):
    slot = lax.rem(visit, 2)
    out_ref[slot, :, at(n)] = sum_ref[:, at(n)].astype(out_ref.dtype)

  def send(visit, goal):
    lax.fori_loop(sent[0], goal, lambda n, _: copy(n, visit).start(), None)
    sent[0] = goal

  def wait(visit):
    for n in range(chunks):
      copy(n, visit).wait()

  def products(x, dy):
    return lax.dot_general(
      x, dy, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )

  # The sums before those that leave now may still be on their way.
  @pl.when(leaves)
  def make_way():
    sent[0] = 0
    pl.when(visit > 2)(lambda: wait(visit - 3))

  @pl.when(whole & leaves)
  def all_rows_after_another_group():
    @pieces
    def _(n):
      leave(n, visit - 1)
      sum_ref[:, at(n)] = products(x_ref[...], dy_ref[:, at(n)])

  @pl.when(whole & ~leaves)
  def all_rows():
    @pieces
    def _(n):
      old = jnp.where(arrives, 0.0, sum_ref[:, at(n)])
      sum_ref[:, at(n)] = old + products(x_ref[...], dy_ref[:, at(n)])

  @pl.when(~whole & arrives)
  def make_room():
    @pieces
    def _(n):
      pl.when(leaves)(lambda: leave(n, visit - 1))
      sum_ref[:, at(n)] = jnp.zeros_like(sum_ref[:, at(n)])

  def add_part(start):
    """Adds the products of the group's rows among `part` rows."""
    here = pl.ds(start, part)

    def mine(ref, columns):
      value = ref[here, columns]
      keep = between(low - start, high - start, value.shape)
      return jnp.where(keep, value, jnp.zeros_like(value))

    @pieces
    def _(n):
      sum_ref[:, at(n)] += products(
        mine(x_ref, slice(None)), mine(dy_ref, at(n))
      )

  @pl.when(~whole)
  def some_rows():
    @pl.loop(0, height // part)
    def _(n):
      start = pl.multiple_of(n * part, part)
      pl.when((low < start + part) & (high > start))(lambda: add_part(start))

  @pl.when(visit > 0)
  def send_some():
    """All chunks of the group before, evenly over the items of this one."""
    after = begin[jnp.minimum(e + 1, groups - 1)]
    left = jnp.where(e + 1 < groups, after, items) - i
    send(visit - 1, sent[0] + lax.div(chunks - sent[0] + left - 1, left))

  @pl.when((strip + 1 == strips) & (i + 1 == items))
  def finish():
    pl.when(visit > 1)(lambda: wait(visit - 2))
    sent[0] = 0
    pieces(lambda n: leave(n, visit))
    send(visit, chunks)
    pl.when(visit > 0)(lambda: wait(visit - 1))
    wait(visit)
