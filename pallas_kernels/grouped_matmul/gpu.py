# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul on Hopper GPUs: row m of x times the weights of its group.

    y_m = x_m w[e(m)],    dw[e] = sum over the rows m of group e of x_m^T dy_m

The rows lie sorted by group, `sizes[e]` of them in group e; sizes are data.  No
tile of the product has rows of two groups, so that the work is that of a dense
product and at most one tile of rows more for each group; a half tile without
rows is not multiplied.  Loads start at multiples of eight rows: up to seven
rows of the group before come along, are computed and not stored; in dw, where
they would be summed, rows of others are set to zero (whatever they hold).

Needs jax >= 0.11 (Mosaic GPU); with 0.12 `interpret=plgpu.InterpretGPUParams()`
runs it on any machine.

Axes: M rows (slots), T tokens, E groups, K features in, N features out.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.groups import (
  block_start,
  borders,
  row_tiles,
  whole_blocks,
)
from pallas_kernels.grouped_matmul.hopper import (
  MULTIPLIERS,
  WIDTH,
  Product,
  Tile,
  default_tile,
  launch,
  store,
  walk,
)
from pallas_kernels.mosaic_gpu import too_old

H100_SMS = 132


def grouped_matmul(
  x: Float[Array, "T K"],
  w: Float[Array, "E K N"] | Float[Array, "E N K"],
  sizes: Int[Array, " E"],
  *,
  rows: Int[Array, " M"] | None = None,
  transpose_w: bool = False,
  tile: Tile | None = None,
  num_sms: int = H100_SMS,
  interpret: Any = None,
) -> Float[Array, "M N"]:
  """Multiplies each row by the weights of its group; differentiable in x and w.

  Args:
    x: rows sorted by group, T = M; with `rows`, in any order.
    w: `[E, N, K]` if `transpose_w`.
    sizes: rows of each group, in order (dynamic).  Rows past their sum are
      nobody's: they give 0 and their values, NaN included, reach nothing.
    rows: slot m reads row `rows[m]` of x (gathered before the kernel).
    tile: by default `default_tile` of the columns of each product.
    num_sms: multiprocessors of the GPU: the number of thread blocks.
    interpret: `plgpu.InterpretGPUParams()` runs the kernel on the CPU.

  Returns:
    The products, summed in float32, in the dtype of x.

  Raises:
    ValueError: x and w are not both bfloat16 or both float16, K or N is not a
      multiple of 64, shapes do not fit, the tile cannot be, or jax is older
      than 0.11.
  """
  inner, outer = (2, 1) if transpose_w else (1, 2)
  _check(x, w, tile, num_sms)
  if w.shape[inner] != x.shape[1] or len(w) != len(sizes):
    raise ValueError(
      f"{x.shape=}, {w.shape=} and {sizes.shape=} do not fit: with"
      f" {transpose_w=}, axis {inner} of `w` must be the features of `x`, and"
      " axis 0 the groups."
    )
  if rows is not None:
    x = x.at[rows].get(mode="clip")
  if not len(x):
    return jnp.zeros((0, w.shape[outer]), x.dtype)
  how = How(transpose_w, tile, num_sms, interpret)
  return _product(x, w, sizes.astype(jnp.int32), how)


def grouped_matmul_dw(
  x: Float[Array, "M K"],
  dy: Float[Array, "M N"],
  sizes: Int[Array, " E"],
  *,
  tile: Tile | None = None,
  num_sms: int = H100_SMS,
  interpret: Any = None,
) -> Float[Array, "E K N"]:
  """The gradient of the weights, dw[e] = x_e^T dy_e; 0 for an empty group.

  Arguments and errors as in `grouped_matmul`.  Not differentiable.
  """
  _check(x, dy, tile, num_sms)
  if len(x) != len(dy):
    raise ValueError(f"{x.shape=} and {dy.shape=} need as many rows.")
  if not len(x):
    return jnp.zeros((len(sizes), x.shape[1], dy.shape[1]), x.dtype)
  how = How(False, tile, num_sms, interpret)
  return _dw(x, dy, sizes.astype(jnp.int32), how)


def _check(x: Array, other: Array, tile: Tile | None, num_sms: int) -> None:
  """Refuses what the kernels cannot do, in words."""
  if reason := too_old():
    raise ValueError(reason)
  if x.dtype not in (jnp.bfloat16, jnp.float16) or other.dtype != x.dtype:
    raise ValueError(
      f"{x.dtype} with {other.dtype}: both operands must be bfloat16 or both"
      " float16; cast them, or use the reference."
    )
  features = x.shape[1], *other.shape[-2 if other.ndim == 3 else -1 :]
  if any(n % WIDTH or not n for n in features):
    raise ValueError(
      f"features {features} must be multiples of {WIDTH}: pad them with zeros,"
      " or use the reference."
    )
  if num_sms < 1:
    raise ValueError(f"{num_sms=} must be at least 1.")
  (tile or default_tile(features[-1])).check()


class How(NamedTuple):
  """The static arguments of a product."""

  transpose_w: bool
  tile: Tile | None
  num_sms: int
  interpret: Any


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


class Work(NamedTuple):
  """One tile, in the kernel: i32 scalars."""

  group: Array
  low: Array  # rows low:high of the group: those of the tile; in dw, all
  high: Array
  across: Array  # which columns of the product, in tiles
  down: Array  # dw only: which of its rows, in tiles
  steps: Array  # of its contraction


def _forward(x: Array, w: Array, sizes: Array, how: How) -> Array:
  """`grouped_matmul` without its gather."""
  (m, k), n = x.shape, w.shape[1 if how.transpose_w else 2]
  tile = how.tile or default_tile(n)
  half, wide_tiles = tile.half, pl.cdiv(n, tile.columns)
  # Tiles made at the same time share rows and weights in the cache.
  band = max(d for d in range(1, 9) if wide_tiles % d == 0)

  def kernel(group, low, high, count, x_ref, w_ref, y_ref, scratch):
    """x: [M, K], w: [E, K, N] or [E, N, K], y: [M, N] in global memory."""
    count, wg = count[0], lax.axis_index("wg")

    def describe(i):
      band_of = lax.div(i, count * band)
      i = i - band_of * count * band
      t = lax.div(i, band)
      return Work(
        group=group[t],
        low=low[t],
        high=high[t],
        across=band_of * band + i - t * band,
        down=jnp.int32(0),
        steps=jnp.where(group[t] < len(sizes), pl.cdiv(k, tile.depth), 0),
      )

    def load(work, step, slot):
      tall = pl.ds(block_start(work.low), tile.rows)
      deep = pl.ds(step * tile.depth, tile.depth)
      wide = pl.ds(work.across * tile.columns, tile.columns)
      part = (wide, deep) if how.transpose_w else (deep, wide)
      full = scratch.full.at[slot]
      plgpu.copy_gmem_to_smem(x_ref.at[tall, deep], scratch.a.at[slot], full)
      w_part = w_ref.at[work.group, *part]
      plgpu.copy_gmem_to_smem(w_part, scratch.b.at[slot], full)

    def multiply(acc, work, step, slot):
      a = scratch.a.at[slot, pl.ds(wg * half, half)]
      b = scratch.b.at[slot]
      plgpu.wgmma(acc, a, b.transpose((1, 0)) if how.transpose_w else b)

    def mine(work):
      """First row of this warp group, and low:high of it are its to store."""
      row = block_start(work.low) + wg * half
      return row, *(jnp.clip(r - row, 0, half) for r in (work.low, work.high))

    def store_rows(work, y):
      row, low, high = mine(work)
      column = work.across * tile.columns
      store(y.astype(x.dtype), y_ref, row, column, scratch.out, low, high)

    def busy(work):
      _, low, high = mine(work)
      return low < high

    product = Product(describe, load, multiply, store_rows, busy)
    walk(product, count * wide_tiles, tile, scratch)

  x = whole_blocks(x)
  w_tile = tile.depth, tile.columns
  run = launch(
    kernel,
    jax.ShapeDtypeStruct((len(x), n), x.dtype),
    ((tile.rows, tile.depth), w_tile[::-1] if how.transpose_w else w_tile),
    tile,
    name="grouped_matmul",
    num_sms=how.num_sms,
    interpret=how.interpret,
    cost=_cost(m, k, n, x.size + w.size + m * n),
  )
  return run(*row_tiles(sizes, len(x), tile.rows), x, w)[:m]


def _dw(x: Array, dy: Array, sizes: Array, how: How) -> Array:
  """`grouped_matmul_dw`: its contraction runs over the rows of a group."""
  (m, k), n = x.shape, dy.shape[1]
  tile = how.tile or default_tile(n)
  half = tile.half
  tall_tiles, wide_tiles = pl.cdiv(k, tile.rows), pl.cdiv(n, tile.columns)

  def kernel(start, end, x_ref, dy_ref, dw_ref, scratch):
    """x: [M, K], dy: [M, N], dw: [E, K, N] in global memory."""
    wg = lax.axis_index("wg")

    def describe(i):
      group = lax.div(i, tall_tiles * wide_tiles)
      i = i - group * tall_tiles * wide_tiles
      down, low, high = lax.div(i, wide_tiles), start[group], end[group]
      steps = lax.div(high - block_start(low) + tile.depth - 1, tile.depth)
      return Work(
        group=group,
        low=low,
        high=high,
        across=i - down * wide_tiles,
        down=down,
        steps=jnp.where(low < high, steps, 0),
      )

    def load(work, step, slot):
      deep = pl.ds(block_start(work.low) + step * tile.depth, tile.depth)
      tall = pl.ds(work.down * tile.rows, tile.rows)
      wide = pl.ds(work.across * tile.columns, tile.columns)
      full = scratch.full.at[slot]
      plgpu.copy_gmem_to_smem(x_ref.at[deep, tall], scratch.a.at[slot], full)
      plgpu.copy_gmem_to_smem(dy_ref.at[deep, wide], scratch.b.at[slot], full)

    def zero_others(slot, low, high):
      """Zeroes all rows but low:high: each warp group its half of x and dy."""
      row = plgpu.broadcasted_iota(
        jnp.int32, (tile.depth, WIDTH), 0, layout=plgpu.Layout.WGMMA
      )
      keep = (row >= low) & (row < high)
      for ring, width in (scratch.a, tile.rows), (scratch.b, tile.columns):
        for column in range(0, width // MULTIPLIERS, WIDTH):
          here = pl.ds(wg * (width // MULTIPLIERS) + column, WIDTH)
          part = ring.at[slot, :, here]
          part[...] = jnp.where(keep, part[...], jnp.zeros((), x.dtype))
      plgpu.commit_smem()
      plgpu.barrier_arrive(scratch.both)
      plgpu.barrier_wait(scratch.both)

    def multiply(acc, work, step, slot):
      first = block_start(work.low) + step * tile.depth
      low, high = work.low - first, work.high - first
      cut = (low > 0) | (high < tile.depth)
      pl.when(cut)(lambda: zero_others(slot, low, high))
      a = scratch.a.at[slot, :, pl.ds(wg * half, half)]
      plgpu.wgmma(acc, a.transpose((1, 0)), scratch.b.at[slot])

    def store_tile(work, dw):
      row = work.down * tile.rows + wg * half
      column = work.across * tile.columns
      to = dw_ref.at[work.group]
      store(dw.astype(x.dtype), to, row, column, scratch.out)

    product = Product(describe, load, multiply, store_tile, lambda work: True)
    walk(product, len(sizes) * tall_tiles * wide_tiles, tile, scratch)

  x, dy = whole_blocks(x), whole_blocks(dy)
  run = launch(
    kernel,
    jax.ShapeDtypeStruct((len(sizes), k, n), x.dtype),
    ((tile.depth, tile.rows), (tile.depth, tile.columns)),
    tile,
    name="grouped_matmul_dw",
    num_sms=how.num_sms,
    interpret=how.interpret,
    cost=_cost(m, k, n, x.size + dy.size + len(sizes) * k * n),
  )
  return run(*borders(sizes, len(x)), x, dy)


def _cost(m: int, k: int, n: int, moved: int) -> pl.CostEstimate:
  """For XLA's scheduler: every row in some group, every array moved once."""
  return pl.CostEstimate(
    flops=2 * m * k * n, transcendentals=0, bytes_accessed=2 * moved
  )
