# SPDX-License-Identifier: Apache-2.0
"""Law: the Hopper kernel is a loop over rows, each times its group's weights.

Runs in the interpreter of Mosaic GPU: warp groups, copies and barriers too.
Operands are small integers in float16, whose sums are exact: results are equal,
not close.
"""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from adaptivejax import core
from adaptivejax.core import expert_kernel
from pallas_kernels.grouped_matmul.groups import BLOCK, row_tiles

if jax.__version_info__ >= (0, 12):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from pallas_kernels.grouped_matmul import gpu
  from pallas_kernels.grouped_matmul.hopper import Tile

  INTERPRETED = {
    "tile": Tile(rows=128, columns=128, depth=64, stages=2),
    "num_sms": 2,
    "interpret": plgpu.InterpretGPUParams(),
  }

interpreted = pytest.mark.skipif(
  jax.__version_info__ < (0, 12),
  reason="the interpreter of Mosaic GPU kernels came with jax 0.12",
)

E, M, K, N = 5, 203, 64, 192
SIZES = {
  "skewed, one empty": (70, 0, 121, 3, 2),
  "a group of many tiles, the last of one row": (0, 0, 202, 0, 1),
  "no row is nobody's": (41, 41, 41, 40, 40),
  "whole tiles": (128, 64, 0, 8, 0),
  "one row": (0, 1, 0, 0, 0),
  "none": (0, 0, 0, 0, 0),
  "too many": (0, 150, 0, 150, 150),
}


def integers(seed, *shape, dtype=np.float16):
  ints = np.random.default_rng(seed).integers(-2, 3, shape)
  return jnp.asarray(ints, dtype)


def owners(sizes, m=M):
  """The group of each row; E: nobody's."""
  groups = np.repeat(np.arange(len(sizes)), sizes)[:m]
  return np.pad(groups, (0, m - len(groups)), constant_values=len(sizes))


def poison(a, sizes):
  """NaN in the rows that are nobody's."""
  return jnp.where((owners(sizes, len(a)) == len(sizes))[:, None], jnp.nan, a)


def forward(x, w, sizes):
  """One row after the other, in double precision; w[E, K, N]."""
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  y = np.zeros((len(x), w.shape[2]))
  for m, e in enumerate(owners(sizes, len(x))):
    if e < len(sizes):
      y[m] = x[m] @ w[e]
  return y


def weights(x, dy, sizes):
  x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
  dw = np.zeros((len(sizes), x.shape[1], dy.shape[1]))
  for m, e in enumerate(owners(sizes, len(x))):
    if e < len(sizes):
      dw[e] += np.outer(x[m], dy[m])
  return dw


@pytest.mark.parametrize("rows", [8, 128])
def test_the_tiles_make_each_row_once(rows):
  draw = np.random.default_rng(0)
  drawn = [draw.multinomial(M - 9, draw.dirichlet([0.3] * E)) for _ in range(9)]
  plan = jax.jit(functools.partial(row_tiles, m=M, rows=rows))
  for sizes in [*SIZES.values(), *map(tuple, drawn)]:
    group, low, high, (count,) = map(np.asarray, plan(jnp.array(sizes)))
    assert count <= len(group)
    made = np.full(M, -1)
    for e, a, b in zip(group[:count], low, high):
      assert a < b <= a - a % BLOCK + rows, "a tile loads the rows it makes"
      assert (made[a:b] == -1).all()
      made[a:b] = e
    np.testing.assert_array_equal(made, owners(sizes))
    assert count <= -(-M // rows) + 2 * (E + 1), "as a dense product, and edges"


@interpreted
@pytest.mark.parametrize("transpose_w", [False, True])
def test_equals_a_loop_over_the_rows(transpose_w):
  """In one trace for all sizes; NaN in the rows past their sum reaches none."""
  x, w = integers(0, M, K), integers(1, E, K, N)
  given = w.transpose(0, 2, 1) if transpose_w else w
  traces = []

  @jax.jit
  def run(x, sizes):
    traces.append(None)
    how = {"transpose_w": transpose_w, **INTERPRETED}
    return gpu.grouped_matmul(x, given, sizes, **how)

  for sizes in SIZES.values():
    y = run(poison(x, sizes), jnp.array(sizes))
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, forward(x, w, sizes))
  assert len(traces) <= 2  # the interpreter's first run changes JAX's context


@interpreted
def test_dw_equals_a_sum_over_the_rows():
  """An empty group gets exactly 0; NaN in nobody's rows reaches none."""
  x, dy = integers(0, M, N), integers(1, M, K)
  run = jax.jit(lambda *a: gpu.grouped_matmul_dw(*a, **INTERPRETED))
  for sizes in SIZES.values():
    dw = run(poison(x, sizes), poison(dy, sizes), jnp.array(sizes))
    assert dw.dtype == x.dtype
    np.testing.assert_array_equal(dw, weights(x, dy, sizes))


@interpreted
def test_nan_stays_in_its_group():
  """Groups 1 and 3 share tiles and blocks of eight rows with theirs."""
  sizes = (13, 7, 100, 5, 60)
  sick = np.isin(owners(sizes), [1, 3])
  x, w, dy = integers(0, M, K), integers(1, E, K, N), integers(2, M, N)
  bad = lambda a: jnp.where(sick[:, None], jnp.nan, a)
  y = gpu.grouped_matmul(bad(x), w, jnp.array(sizes), **INTERPRETED)
  want = np.where(sick[:, None], np.nan, forward(x, w, sizes))
  np.testing.assert_array_equal(y, want)
  run = jax.jit(lambda *a: gpu.grouped_matmul_dw(*a, **INTERPRETED))
  for a, b in (bad(x), dy), (x, bad(dy)):
    dw = run(a, b, jnp.array(sizes))
    want = weights(x, dy, sizes)
    want[[1, 3]] = np.nan
    np.testing.assert_array_equal(dw, want)


@interpreted
@pytest.mark.parametrize("transpose_w", [False, True])
def test_gradients_of_gathered_rows(transpose_w):
  """Slot m takes row rows[m] of x; a row may be taken often, or by nobody."""
  t, sizes = 40, (17, 0, 30, 2, 1)
  m = sum(sizes) + 6
  x, w, dy = integers(0, t, K), integers(1, E, K, N), integers(2, m, N)
  rows = jnp.asarray(np.random.default_rng(3).integers(0, t - 1, m))
  given = w.transpose(0, 2, 1) if transpose_w else w
  how = {"transpose_w": transpose_w, **INTERPRETED}

  def product(x, w):
    out = gpu.grouped_matmul(x, w, jnp.array(sizes), rows=rows, **how)
    return jnp.where((owners(sizes, m) < E)[:, None], out, 0)

  y, pull = jax.vjp(product, x, given)
  np.testing.assert_array_equal(y, forward(x[rows], w, sizes))
  dx, dw = pull(dy)
  want = np.zeros((t, K))
  np.add.at(want, rows, forward(dy, w.transpose(0, 2, 1), sizes))
  np.testing.assert_array_equal(dx, want)
  want = weights(x[rows], dy, sizes)
  want = want.transpose(0, 2, 1) if transpose_w else want
  np.testing.assert_array_equal(dw, want)


@interpreted
def test_no_races():
  """Between warp groups, copies and thread blocks."""
  careful = plgpu.InterpretGPUParams(detect_races=True)
  how = {**INTERPRETED, "interpret": careful}
  sizes = jnp.array([70, 0, 121, 3, 2])
  x, w, dy = integers(0, M, 3 * K), integers(1, E, 3 * K, K), integers(2, M, K)
  y = gpu.grouped_matmul(x, w, sizes, **how)
  np.testing.assert_array_equal(y, forward(x, w, sizes))
  dw = gpu.grouped_matmul_dw(x, dy, sizes, **how)
  np.testing.assert_array_equal(dw, weights(x, dy, sizes))


@interpreted
@pytest.mark.parametrize("m", [0, 1])
def test_few_rows(m):
  x, w, sizes = integers(0, m, K), integers(1, 2, K, K), (0, m)
  y = gpu.grouped_matmul(x, w, jnp.array(sizes), **INTERPRETED)
  np.testing.assert_array_equal(y, forward(x, w, sizes))
  dw = gpu.grouped_matmul_dw(x, y, jnp.array(sizes), **INTERPRETED)
  np.testing.assert_array_equal(dw, weights(x, y, sizes))


@interpreted
@pytest.mark.parametrize("tile", [(128, 128, 128, 2), (256, 128, 64, 3)])
def test_other_tiles_and_more_blocks_than_tiles(tile):
  """Steps deeper than the features left, tall tiles; bfloat16."""
  sizes = (30, 0, 100, 5, 60)
  x = integers(0, M, 3 * K, dtype=jnp.bfloat16)
  w = integers(1, E, 3 * K, K, dtype=jnp.bfloat16)
  how = {**INTERPRETED, "tile": Tile(*tile), "num_sms": 7}
  y = gpu.grouped_matmul(x, w, jnp.array(sizes), **how)
  assert y.dtype == jnp.bfloat16
  want = jnp.asarray(forward(x, w, sizes), jnp.bfloat16)
  np.testing.assert_array_equal(y, want)


@interpreted
def test_lowers_for_a_gpu():
  """Forward and backward, by default tiles; no GPU is asked for."""
  like = jax.ShapeDtypeStruct
  x = like((300, 192), jnp.bfloat16)
  w = like((4, 192, 320), jnp.bfloat16)

  def loss(x, w, sizes):
    return gpu.grouped_matmul(x, w, sizes, num_sms=114).sum()

  grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
  made = jax.export.export(grad, platforms=["cuda"])(x, w, like((4,), "int32"))
  assert made.mlir_module().count("@mosaic_gpu_v2") >= 2


@pytest.fixture
def unchecked_shapes():
  """As users run it: nobody has looked at the shapes before."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@interpreted
@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"x": (8, 64, np.float32)}, "cast them"),
    ({"x": (8, 65)}, "multiples of 64"),
    ({"x": (8, 128)}, "features of `x`"),
    ({"sizes": 3}, "groups"),
    ({"num_sms": 0}, "num_sms=0"),
    ({"tile": (192, 128, 64, 2)}, "multiples of 128"),
    ({"tile": (256, 256, 64, 2)}, "128 x 256"),
    ({"tile": (128, 256, 64, 5)}, "bytes of shared memory"),
  ],
)
def test_refuses(unchecked_shapes, change, says):
  m, k, *dtype = change.get("x", (8, 64))
  x = jnp.zeros((m, k), *(dtype or [np.float16]))
  w = jnp.zeros((2, 64, 64), np.float16)
  sizes = jnp.zeros(change.get("sizes", 2), jnp.int32)
  tile = Tile(*change.get("tile", Tile()))
  with pytest.raises(ValueError, match=says):
    sms = change.get("num_sms", 1)
    gpu.grouped_matmul(x, w, sizes, tile=tile, num_sms=sms)


@interpreted
def test_experts_run_it_on_hopper(monkeypatch):
  """In 16 bits, where all GPUs are Hopper; a gradient is y, dx and dw."""

  def kernels(platform, dtype=jnp.bfloat16):
    def loss(x, w):
      experts = jnp.arange(M)[:, None] % E
      plan = core.dispatch(experts, jnp.ones((M, 1), dtype), E)
      f = lambda rows, w: jnp.tanh(rows @ w)
      together = lambda rows, w, product: jnp.tanh(product(rows, w))
      return core.expert_apply(f, x, plan, w, together=together)[0].sum()

    x, w = jnp.ones((M, K), dtype), jnp.ones((E, K, N), dtype)
    f = jax.jit(jax.grad(loss, (0, 1)))
    made = jax.export.export(f, platforms=[platform])(x, w)
    return made.mlir_module().count("@mosaic_gpu_v2")

  assert kernels("cuda") == 0, "this machine has no GPU"
  monkeypatch.setattr(expert_kernel, "on_hopper", lambda: True)
  assert kernels("cuda") == 3
  assert kernels("cuda", jnp.float32) == 0
  assert kernels("cpu") == 0


@pytest.mark.skipif(
  jax.__version_info__ >= (0, 11), reason="jax is new enough for the kernel"
)
def test_refuses_an_old_jax():
  from pallas_kernels.grouped_matmul import gpu

  x, w = jnp.zeros((8, 64), jnp.bfloat16), jnp.zeros((1, 64, 64), jnp.bfloat16)
  with pytest.raises(ValueError, match=r"jax >= 0\.11"):
    gpu.grouped_matmul(x, w, jnp.array([8]))
