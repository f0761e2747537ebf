# SPDX-License-Identifier: Apache-2.0
"""The public grouped matmul: checks, padding and derivatives of the kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import tpu, tpu_sums, tuned
from pallas_kernels.grouped_matmul.tuned import LANES, Tiles
from pallas_kernels.grouped_matmul.work import make_work

DTYPES = (jnp.bfloat16, jnp.float32)
MOST_SCALARS = 200_000
"""32-bit words of the list that fit the scalar memory of every chip, 1 MiB."""


def grouped_matmul(
  x: jax.Array,
  w: jax.Array,
  sizes: jax.Array,
  *,
  rows: jax.Array | None = None,
  transpose_w: bool = False,
  tiles: Tiles | None = None,
  sums_tiles: Tiles | None = None,
  interpret: Any = False,
  debug: bool = False,
) -> jax.Array:
  """Multiplies each row by the matrix of its group, on TPU.

  Rows are sorted by group: the first `sizes[0]` belong to group 0, and so on;
  rows past the last group give 0.  Differentiable in `x` and `w`.  What is not
  in a group, in `x`, in the cotangent, or among the rows that `rows` does not
  name, reaches nothing, NaN included; an empty group has the gradient 0.

  Sums are in f32 and leave in the dtype of `x`.  Sizes that are no multiples of
  128 (K, N) or of a tile (M) are padded, which copies.  Axes: M rows, T rows of
  an unsorted `x`, K features in, N features out, E groups.

  Args:
    x: [M, K], or [T, K] with `rows`; bf16 or f32.
    w: [E, K, N], or [E, N, K] with `transpose_w`; the dtype of `x`.
    sizes: i32[E], rows of each group; dynamic; their sum is at most M.
    rows: i32[M], place m holds `x[rows[m]]`: picked inside the kernel where `x`
      fits in VMEM as f32 and K is a multiple of 1024, by XLA elsewhere, and in
      the gradient of `w`.  At places past the last group anything.
    transpose_w: multiply by the transposes.
    tiles: how to cut the work; by the figures of the chip if not given.
    sums_tiles: the same for the gradient of `w`.
    interpret: as in `pallas_call`: True or `pltpu.InterpretParams` off TPU.
    debug: check the bounds of every transfer.

  Returns:
    y, [M, N], of the dtype of `x`.

  Raises:
    ValueError: shapes or dtypes do not fit together, or no tile fits in VMEM.
  """
  _check(x, w, sizes, rows, transpose_w)
  config = (transpose_w, tiles, sums_tiles, interpret, debug)
  return _grouped_matmul(config, x, w, sizes, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(config, x, w, sizes, rows):
  transpose_w, tiles, _, interpret, debug = config
  return _map(
    x, w, sizes, rows, transpose_w, tiles, interpret=interpret, debug=debug
  )


def _forward(config, x, w, sizes, rows):
  return _grouped_matmul(config, x, w, sizes, rows), (x, w, sizes, rows)


def _backward(config, residuals, dy):
  """dx_m = dy_m w_e^T, added up over `rows`; dw_e = sum of x_m^T dy_m."""
  transpose_w, _, sums_tiles, interpret, debug = config
  x, w, sizes, rows = residuals
  how = {"interpret": interpret, "debug": debug}
  dx = _map(dy, w, sizes, None, not transpose_w, None, **how)
  picked = x
  if rows is not None:
    rows = jnp.clip(rows, 0, len(x) - 1)  # past the last group dx is 0
    picked = x[rows]
    dx = jnp.zeros(x.shape, jnp.float32).at[rows].add(dx).astype(x.dtype)
  pair = (dy, picked) if transpose_w else (picked, dy)
  dw = sums(*pair, sizes, tiles=sums_tiles, **how)
  none = lambda a: a if a is None else np.zeros(a.shape, jax.dtypes.float0)
  return dx, dw, none(sizes), none(rows)


_grouped_matmul.defvjp(_forward, _backward)


SETTINGS = "transpose_w", "tiles", "interpret", "debug"


@functools.partial(jax.jit, static_argnames=SETTINGS, inline=True)
def _map(x, w, sizes, rows, transpose_w, tiles, interpret, debug):
  """The forward kernel on padded arrays; traced once for each shape."""
  groups, features = len(w), x.shape[1]
  columns = w.shape[1 if transpose_w else 2]
  size = len(x) if rows is None else len(rows)
  if 0 in (size, groups, features, columns):
    return jnp.zeros((size, columns), x.dtype)
  x = _pad(x, (1, LANES))
  w = _pad(w, (1, LANES), (2, LANES))
  shape = (size, x.shape[1], w.shape[1 if transpose_w else 2], x.dtype.itemsize)
  if rows is not None:
    rows = jnp.clip(rows, 0, len(x) - 1).astype(jnp.int32)
    if tiles is None and size <= MOST_SCALARS // 2:
      tiles = tuned.matmul_tiles(*shape, gathered=len(x))
  tiles = tiles or tuned.matmul_tiles(*shape)
  if tiles is None:
    raise ValueError(
      f"no {shape[1]} x {LANES} weights fit in VMEM: split the features"
      f" of x{x.shape} and add the results"
    )
  _check_tiles(tiles, *shape[1:3], gathers=rows is not None)
  if rows is not None and not tiles.slab:
    x, rows = x[rows], None
  if rows is None:
    x = _pad(x, (0, tiles.height))
  else:
    x, rows = _pad(x, (0, tiles.slab)), _pad(rows, (0, tiles.height))
  padded = len(x) if rows is None else len(rows)
  work = _work(sizes, padded, tiles, sums=False)
  y = tpu.multiply(
    x,
    w,
    work,
    rows,
    tiles=tiles,
    transpose_w=transpose_w,
    interpret=interpret,
    debug=debug,
  )
  return y[:size, :columns]


@functools.partial(
  jax.jit, static_argnames=("tiles", "interpret", "debug"), inline=True
)
def sums(
  x: jax.Array,
  dy: jax.Array,
  sizes: jax.Array,
  *,
  tiles: Tiles | None = None,
  interpret: Any = False,
  debug: bool = False,
) -> jax.Array:
  """z_e = sum of x_m^T dy_m over the rows m of group e, [E, K, N].

  The gradient of the weights; arguments as in `grouped_matmul`, unchecked.
  """
  (size, features), columns, groups = x.shape, dy.shape[1], len(sizes)
  if 0 in (size, groups, features, columns):
    return jnp.zeros((groups, features, columns), x.dtype)
  x, dy = _pad(x, (1, LANES)), _pad(dy, (1, LANES))
  tiles = tiles or tuned.sums_tiles(
    size, x.shape[1], dy.shape[1], x.dtype.itemsize
  )
  if tiles is None:
    raise ValueError(
      f"no sums of {x.shape[1]} x {LANES} fit in VMEM: split the {features}"
      f" features of the gradient of w[{groups}, {features}, {columns}]"
    )
  _check_tiles(tiles, x.shape[1], dy.shape[1], gathers=False)
  x, dy = _pad(x, (0, tiles.height)), _pad(dy, (0, tiles.height))
  work = _work(sizes, len(x), tiles, sums=True)
  z = tpu_sums.multiply_sums(
    x, dy, work, tiles=tiles, interpret=interpret, debug=debug
  )
  return z[:, :features, :columns]


def _work(sizes, rows, tiles, *, sums):
  work = make_work(sizes, rows, tiles.height, sums=sums)
  length = sum(x.size for x in work)
  if length > MOST_SCALARS:
    raise ValueError(
      f"{rows} rows in tiles of {tiles.height} and {len(sizes)} groups make a"
      f" list of {length} words, and {MOST_SCALARS} fit: call for parts of rows"
    )
  return work


def _pad(x, *multiples):
  """Zeros at the end of axes, up to multiples: pairs (axis, multiple)."""
  pads = [(0, 0)] * x.ndim
  for axis, multiple in multiples:
    pads[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, pads) if any(end for _, end in pads) else x


def _check_tiles(tiles, features, columns, *, gathers):
  """Raises where given tiles do not fit the padded sizes."""
  t = tiles
  divides = (
    t.height % t.part == 0
    and columns % (t.width * t.cores) == 0
    and t.width % t.piece == t.piece % t.chunk == t.chunk % LANES == 0
  )
  if not divides or t.depth < 2:
    raise ValueError(
      f"{tiles=}: part must divide height, chunk piece, piece width, and width"
      f" x cores {columns} columns; chunk must be a multiple of {LANES}, and"
      " depth at least 2"
    )
  if t.slab and (not gathers or features % tuned.WHOLE_ROWS):
    raise ValueError(
      f"{tiles=}: a slab is for `rows` of a multiple of {tuned.WHOLE_ROWS}"
      f" features; got {features}"
    )


def _check(x, w, sizes, rows, transpose_w):
  """Raises where shapes and dtypes do not fit together."""
  if x.ndim != 2 or w.ndim != 3 or sizes.ndim != 1:
    raise ValueError(
      "x is [M, K], w [E, K, N] and sizes [E]; got shapes"
      f" {x.shape}, {w.shape} and {sizes.shape}"
    )
  if x.dtype not in DTYPES or w.dtype != x.dtype:
    raise ValueError(
      "x and w are both bfloat16 or both float32; got"
      f" {x.dtype} and {w.dtype}: cast them"
    )
  axis = 2 if transpose_w else 1
  if w.shape[axis] != x.shape[1]:
    other = w.shape[3 - axis] == x.shape[1]
    raise ValueError(
      f"x{x.shape} has {x.shape[1]} features, but w{w.shape} has"
      f" {w.shape[axis]} on axis {axis}"
      + (f": try transpose_w={not transpose_w}" if other else "")
    )
  if len(sizes) != len(w):
    raise ValueError(f"w has {len(w)} groups, and sizes {len(sizes)}")
  for name, array in (("sizes", sizes), ("rows", rows)):
    if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
      raise ValueError(f"{name} must be integers; got {array.dtype}")
  if rows is not None and rows.ndim != 1:
    raise ValueError(f"rows is [M]; got shape {rows.shape}")
  if rows is not None and not len(x) and len(rows):
    raise ValueError(f"x{x.shape} has no rows for the {len(rows)} of `rows`")
