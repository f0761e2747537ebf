"""Law: the kernels are `reference.grouped_matmul`, values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import (
  Tiles,
  grouped_matmul,
  reference,
  tuned,
)
from pallas_kernels.grouped_matmul.specs import (
  EXPERTS,
  MANY_EXPERTS,
  TINY,
)
from pallas_kernels.grouped_matmul.work import make_work

SIZES = {
  "even": (18, 17, 18, 17),
  "an empty group inside": (20, 0, 30, 20),
  "rows of no group": (3, 40, 1, 5),
  "one row": (0, 0, 1, 0),
  "one group": (0, 70, 0, 0),
  "borders of tiles": (32, 32, 6, 0),
  "nothing": (0, 0, 0, 0),
}
CHIPS = {
  "v4": (pltpu.ChipVersion.TPU_V4, 2),
  "v5e": (pltpu.ChipVersion.TPU_V5E, 1),
  "v5p": (pltpu.ChipVersion.TPU_V5P, 2),
  "v6e": (pltpu.ChipVersion.TPU_V6E, 1),
}


@dataclasses.dataclass(frozen=True)
class Form:
  """A way to call it, with tiles that give each kernel several of all."""

  features: int = TINY.features
  dtype: str = "float32"
  gathers: bool = False
  transpose_w: bool = False
  strips: int = 1

  @property
  def how(self):
    slab = 16 if self.gathers else 0
    width = TINY.columns // self.strips
    sums = TINY.features if self.transpose_w else width
    return {
      "debug": True,
      "transpose_w": self.transpose_w,
      "tiles": Tiles(32, 8, width, 128, 128, 3, slab=slab),
      "sums_tiles": Tiles(32, 16, sums, 128, sums),
    }

  def arrays(self, total=0):
    """x, w, rows, dy: NaN in all that no group has."""
    keys = jax.random.split(jax.random.key(0), 4)
    spec, k = TINY, self.features
    normal = lambda key, *shape: jax.random.normal(key, shape).astype(
      self.dtype
    )
    shape = (spec.columns, k) if self.transpose_w else (k, spec.columns)
    w = normal(keys[0], spec.groups, *shape) / np.sqrt(k).astype(self.dtype)
    dy = normal(keys[1], spec.rows, spec.columns).at[total:].set(jnp.nan)
    if not self.gathers:
      x = normal(keys[2], spec.rows, k).at[total:].set(jnp.nan)
      return x, w, None, dy
    x = normal(keys[2], spec.tokens, k).at[-1].set(jnp.nan)
    rows = jax.random.randint(keys[3], (spec.rows,), 0, spec.tokens - 1)
    return x, w, rows.at[total:].set(spec.tokens - 1), dy


FORMS = {
  "two strips, transposed": Form(transpose_w=True, strips=2),
  "rows, bf16": Form(features=1024, gathers=True, dtype="bfloat16"),
}
RACES = {
  "bf16": Form(dtype="bfloat16"),
  "two strips, rows": Form(features=1024, gathers=True, strips=2),
}


@functools.cache
def gradients(form, kernel):
  """(x, w, rows, dy, sizes) -> y, dx, dw; one program for all sizes."""
  how = (
    form.how | {"interpret": True}
    if kernel
    else {"transpose_w": form.transpose_w}
  )
  apply = grouped_matmul if kernel else reference.grouped_matmul

  def run(x, w, rows, dy, sizes):
    y, back = jax.vjp(lambda x, w: apply(x, w, sizes, rows=rows, **how), x, w)
    return y, *back(dy)

  return jax.jit(run)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_the_reference(form, sizes):
  arrays = form.arrays(sum(sizes))
  got = gradients(form, True)(*arrays, jnp.array(sizes))
  want = gradients(form, False)(*arrays, jnp.array(sizes))
  tolerance = 1e-5 if form.dtype == "float32" else 1e-2
  for name, a, b in zip(("y", "dx", "dw"), got, want):
    assert a.dtype == b.dtype == form.dtype, name
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    scale = np.abs(b).max()
    np.testing.assert_allclose(
      a, b, atol=tolerance * (scale + 1e-9), err_msg=name
    )
  y, _, dw = got
  assert not y[sum(sizes) :].any()
  assert not dw[np.array(sizes) == 0].any()


@pytest.mark.parametrize("form", RACES.values(), ids=RACES)
def test_no_races(form):
  """Forward, picking rows or not, and the sums of the gradient."""
  sizes = SIZES["rows of no group"]
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  x, w, rows, dy = form.arrays(sum(sizes))
  how = form.how | {"interpret": params}
  apply = lambda w: grouped_matmul(x, w, jnp.array(sizes), rows=rows, **how)
  y, back = jax.vjp(apply, w)
  got = y, *back(dy)
  assert not found_races()
  want = gradients(form, False)(x, w, rows, dy, jnp.array(sizes))
  tolerance = 1e-5 if form.dtype == "float32" else 1e-2
  for a, b in zip(got, (want[0], want[2])):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def found_races():
  """What the interpreter's detector says of the last kernel."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as module

  return module.races.races_found


@pytest.mark.parametrize("sums", [False, True], ids=["map", "sum"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_work_list_has_every_row_once(sizes, sums):
  rows, height, groups = 96, 32, len(sizes)
  make = jax.jit(make_work, static_argnums=(1, 2), static_argnames="sums")
  work = jax.tree.map(
    np.asarray, make(jnp.array(sizes), rows, height, sums=sums)
  )
  items = list(zip(work.group, work.tile))[: work.count]
  assert items == sorted(items) and len(set(items)) == len(items)
  owner = np.repeat([*range(groups), groups], [*sizes, rows - sum(sizes)])
  seen = np.full(rows, -1)
  for e, t in items:
    low, high = work.offsets[e : e + 2]
    here = np.arange(max(low, t * height), min(high, (t + 1) * height))
    assert sums or len(here)
    assert (seen[here] == -1).all()
    seen[here] = e
  np.testing.assert_array_equal(
    seen, np.where(sums & (owner == groups), -1, owner)
  )
  visited = list(dict.fromkeys(e for e, _ in items if e < groups))
  if sums:
    assert visited == list(range(groups))
  assert work.ordinal[groups] == len(visited)
  for n, e in enumerate(visited):
    assert work.order[n] == e and work.ordinal[e] == n
    assert items[work.begin[n]][0] == e and e not in [
      g for g, _ in items[: work.begin[n]]
    ]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("spec", [EXPERTS, MANY_EXPERTS], ids=lambda s: s.name)
@pytest.mark.parametrize("gathered", [False, True])
def test_tiles_divide_and_fit(chip, spec, gathered):
  info = pltpu.get_tpu_info_for_chip(*CHIPS[chip])
  shape = spec.rows, spec.features, spec.columns, 2
  tiles = tuned.matmul_tiles(*shape, gathered=gathered * spec.tokens, info=info)
  for t in (tiles, tuned.sums_tiles(*shape, info=info)):
    if t is None:  # only all rows of x may not fit
      assert gathered and chip in ("v4",)
      continue
    assert spec.rows % t.height == 0 == t.height % t.part
    assert spec.columns % (t.width * t.cores) == 0
    assert t.width % t.piece == 0 == t.piece % t.chunk and t.chunk % 128 == 0
    assert t.vmem_limit_bytes <= info.vmem_capacity_bytes


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300, 8192, 8320])
def test_rows_are_padded_to_a_part_at_most(rows):
  info = pltpu.get_tpu_info_for_chip(*CHIPS["v5e"])
  tiles = tuned.matmul_tiles(rows, 1024, 4096, 2, info=info)
  assert tuned.round_up(rows, tiles.height) - rows < tiles.part


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_lowers_for_tpu(form):
  """The compiler of TPUs takes it as it is, with the tiles of the rule."""
  how = {"transpose_w": form.transpose_w}
  x, w, rows, dy = form.arrays()

  def run(x, w, rows, dy, sizes):
    y, back = jax.vjp(
      lambda x, w: grouped_matmul(x, w, sizes, rows=rows, **how), x, w
    )
    return y, *back(dy)

  sizes = jnp.array(SIZES["even"])
  module = jax.export.export(jax.jit(run), platforms=["tpu"])(
    x, w, rows, dy, sizes
  )
  assert module.mlir_module().count("tpu_custom_call") == 3


def test_empty_arrays():
  x, w = jnp.ones((0, 128)), jnp.ones((2, 128, 128))
  sizes = jnp.zeros(2, jnp.int32)
  assert grouped_matmul(x, w, sizes).shape == (0, 128)
  assert not jax.grad(lambda w: grouped_matmul(x, w, sizes).sum())(w).any()


X, W, S = jnp.ones((8, 128)), jnp.ones((2, 128, 256)), jnp.array([4, 4])


@pytest.mark.parametrize(
  "args, how, message",
  [
    ((X[0], W, S), {}, "x is .M, K."),
    ((X, W[0], S), {}, "x is .M, K."),
    ((X, W, S), {"transpose_w": True}, "try transpose_w=False"),
    ((X[:, :64], W, S), {}, "64 features, but w.* has 128"),
    ((X, W, S[:1]), {}, "2 groups, and sizes 1"),
    ((X, W.astype(jnp.bfloat16), S), {}, "both bfloat16 or both float32"),
    ((X.astype(jnp.float16), W.astype(jnp.float16), S), {}, "cast them"),
    ((X, W, S.astype(jnp.float32)), {}, "sizes must be integers"),
    ((X, W, S), {"rows": jnp.ones(8)}, "rows must be integers"),
    ((X, W, S), {"rows": S[None]}, "rows is .M."),
    ((X[:0], W, S), {"rows": S}, "no rows for the 2"),
  ],
)  # fmt: skip
def test_bad_input(args, how, message):
  with pytest.raises(ValueError, match=message):
    grouped_matmul(*args, **how)


@pytest.mark.parametrize(
  "change",
  [
    {"width": 384},
    {"part": 24},
    {"chunk": 64},
    {"piece": 96},
    {"depth": 1},
    {"slab": 16},
  ],
  ids=str,
)
def test_bad_tiles(change):
  tiles = dataclasses.replace(Tiles(32, 8, 256, 128, 256), **change)
  with pytest.raises(ValueError, match="tiles"):
    grouped_matmul(X, W, S, tiles=tiles)


def test_too_many_features():
  x = jax.ShapeDtypeStruct((8, 1 << 20), jnp.float32)
  w = jax.ShapeDtypeStruct((2, 1 << 20, 128), jnp.float32)
  with pytest.raises(ValueError, match="split the features"):
    jax.eval_shape(grouped_matmul, x, w, S)


def test_too_long_a_list():
  x = jax.ShapeDtypeStruct((1 << 26, 128), jnp.float32)
  w = jax.ShapeDtypeStruct((2, 128, 128), jnp.float32)
  with pytest.raises(ValueError, match="call for parts of rows"):
    jax.eval_shape(grouped_matmul, x, w, S)
