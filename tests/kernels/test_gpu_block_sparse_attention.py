# SPDX-License-Identifier: Apache-2.0
"""Law: the Hopper kernel is `reference.block_sparse_attention`.

Runs in the interpreter of Mosaic GPU: warp groups, copies and barriers too.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import gpu, gpu_plan, ops, reference
from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  BlockLists,
  Marks,
  Rule,
)

if jax.__version_info__ >= (0, 12):
  from jax.experimental.pallas import mosaic_gpu as plgpu

  INTERPRETED = plgpu.InterpretGPUParams()

interpreted = pytest.mark.skipif(
  jax.__version_info__ < (0, 12),
  reason="the interpreter of Mosaic GPU kernels came with jax 0.12",
)
FULL = Rule(causal=False)


@dataclasses.dataclass(frozen=True)
class Form:
  """Sizes of a call, and which marks it has."""

  batch: int = 1
  heads: int = 2
  key_heads: int = 1
  list_heads: int = 1
  queries: int = 128
  keys: int = 192
  width: int = 64
  value_width: int = 64
  block_q: int = 64
  block_kv: int = 64
  rule: Rule = CAUSAL
  dtype: str = "float16"
  marks: tuple[str, ...] = ()
  mark_heads: int = 1
  rows: bool = False

  def arrays(self, seed=0):
    """q, k, v, lists and marks; past their counts, lists hold rubbish."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape)
    whole = lambda low, high, *shape: rng.integers(low, high, shape)
    b, h, g = self.batch, self.heads, self.key_heads
    t, s, d, e = self.queries, self.keys, self.width, self.value_width
    shapes = (b, h, t, d), (b, g, s, d), (b, g, s, e)
    q, k, v = (jnp.asarray(normal(*shape), self.dtype) for shape in shapes)
    p = self.mark_heads
    made = {
      "q_pos": whole(-1, s, b, t),
      "kv_pos": whole(-1, s, b, p, s),
      "q_segment": whole(0, 2, b, t),
      "kv_segment": whole(0, 2, b, s),
      "kv_bias": normal(b, p, s).astype(np.float32),
      "sinks": normal(h).astype(np.float32),
    }
    marks = Marks(**{name: jnp.asarray(made[name]) for name in self.marks})
    shape = -(-t // self.block_q), -(-s // self.block_kv)
    mask = rng.random((b, self.list_heads, *shape)) < 0.7
    rows = None
    if self.rows:
      rows = jnp.asarray(rng.random((*mask.shape, self.block_q)) < 0.8)
    return q, k, v, self.lists(mask, rows), marks

  def lists(self, mask, rows=None):
    """Of bool[B, L, Q, K]."""
    count = mask.sum(-1)
    index = np.argsort(~mask, axis=-1, kind="stable")
    index = np.where(np.arange(mask.shape[-1]) < count[..., None], index, 77)
    i32 = lambda x: jnp.asarray(x, jnp.int32)
    return BlockLists(i32(index), i32(count), rows, self.block_q, self.block_kv)


POSITIONS, SEGMENTS = ("q_pos", "kv_pos"), ("q_segment", "kv_segment")
FORMS = {
  "cut off, a list for each key head": Form(
    heads=4, key_heads=2, list_heads=2, queries=77, keys=150, marks=("sinks",),
    rule=FULL,
  ),
  "a list for each head, one warp group; positions, bias, softcap": Form(
    key_heads=2, list_heads=2, marks=(*POSITIONS, "kv_bias"), mark_heads=2,
    rule=Rule(softcap=2.0, window=90), queries=64,
  ),
  "segments, rows, lists of more than 32": Form(
    batch=2, marks=SEGMENTS, rows=True, queries=64, keys=50 * 64, rule=FULL
  ),
  "wide, bf16, window": Form(
    queries=128, keys=300, width=128, value_width=128, block_q=128,
    block_kv=128, heads=1, dtype="bfloat16", rule=Rule(scale=0.2, window=70),
  ),
  "widths that differ, blocks of two parts, bias without a mask": Form(
    queries=64, keys=512, width=64, value_width=128, block_kv=256, rule=FULL,
    marks=("kv_bias",),
  ),
}  # fmt: skip


def same(got, want, dtype="float16"):
  """Equal up to the rounding of weights to the dtype; -inf and NaN alike."""
  close = {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
  wide = lambda a: np.asarray(a, np.float32)
  assert got.out.dtype == want.out.dtype
  np.testing.assert_allclose(wide(got.out), wide(want.out), close, close)
  np.testing.assert_allclose(got.lse, want.lse, 1e-5, 1e-4)


def run(*args, rule=CAUSAL):
  return gpu.forward(*args, rule, interpret=INTERPRETED)


@interpreted
@pytest.mark.parametrize("name", FORMS)
def test_is_the_reference(name):
  form = FORMS[name]
  args = form.arrays()
  want = reference.block_sparse_attention(*args, form.rule)
  same(run(*args, rule=form.rule), want, form.dtype)


@interpreted
def test_lists_are_data():
  """One trace for all lists: none, one block, all; a tile that sees nothing."""
  form = Form(rule=FULL)
  q, k, v, *_ = form.arrays()
  traces = []

  @jax.jit
  def attend(lists):
    traces.append(None)
    return run(q, k, v, lists, UNMARKED, rule=FULL)

  for mask in ([0, 0, 0], [0, 0, 0]), ([0, 1, 0], [0, 0, 0]), ([1] * 3,) * 2:
    lists = form.lists(np.array(mask, bool)[None, None])
    got = attend(lists)
    same(got, reference.block_sparse_attention(q, k, v, lists, UNMARKED, FULL))
    empty = ~np.array(mask, bool).any(-1).repeat(form.block_q)
    assert np.isneginf(np.asarray(got.lse)[0, 0]).tolist() == empty.tolist()
    assert not np.asarray(got.out)[:, :, empty].any()
  assert len(traces) <= 2  # the interpreter's first run changes JAX's context


@interpreted
def test_nan_reaches_only_those_who_see_it():
  """As `ops` gives them: keys that are not finite, values that are."""
  form = Form(queries=64, marks=SEGMENTS)
  q, k, v, _, marks = form.arrays()
  lists = form.lists(np.ones((1, 1, 1, 3), bool))
  k = k.at[:, :, 5].set(jnp.nan)
  got = run(q, k, v, lists, marks)
  want = reference.block_sparse_attention(q, k, v, lists, marks)
  assert np.isnan(want.lse).any() and not np.isnan(want.lse).all()
  same(got, want)


@interpreted
def test_no_races():
  """More blocks than slots; between warp groups, copies and thread blocks."""
  form = Form(
    queries=64, keys=6 * 64, marks=(*POSITIONS, *SEGMENTS, "kv_bias", "sinks")
  )
  q, k, v, _, marks = form.arrays()
  args = q, k, v, form.lists(np.ones((1, 1, 1, 6), bool)), marks
  sizes = gpu_plan.sizes(*args)
  assert sizes.multipliers == 2 and sizes.stages < 6
  careful = plgpu.InterpretGPUParams(detect_races=True)
  got = gpu.forward(*args, interpret=careful)
  same(got, reference.block_sparse_attention(*args))


def test_splits_large_blocks():
  """Blocks of 192 are three of 64; those of 256, two of 128."""
  for size, part in (192, 64), (256, 128), (128, 128):
    form = Form(keys=1000, block_kv=size, rows=True, list_heads=2, heads=4)
    lists = form.arrays()[3]
    parts = gpu_plan.split(lists)
    assert parts.block_kv == part
    want = reference.expanded(lists, form.queries, form.keys)
    got = reference.expanded(parts, form.queries, form.keys)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  "form",
  [
    Form(heads=6, key_heads=2, list_heads=1, batch=2, queries=150),
    Form(heads=4, key_heads=2, list_heads=4, queries=300, block_q=128),
    Form(heads=3, key_heads=1, list_heads=1, queries=64),
  ],
)
def test_every_query_has_one_warp_group(form):
  """And reads keys and lists of its own."""
  q, k, v, lists, marks = form.arrays()
  sizes = gpu_plan.sizes(q, k, v, lists, marks)
  made = np.zeros((form.batch, form.heads, sizes.cut.tiles * form.block_q), int)
  for item in range(sizes.grid):
    place = sizes.place(jnp.int32(item))
    for group in range(sizes.multipliers):
      head, first = map(int, sizes.piece(place, group))
      batch = int(place.batch)
      made[batch, head, first : first + gpu_plan.PIECE] += 1
      for a in k, lists.index:
        owner = sizes.owner(place, a)
        assert [int(x) for x in owner] == [
          batch,
          head * a.shape[1] // form.heads,
        ]
  assert (made == 1).all()


@interpreted
@pytest.mark.parametrize(
  "name", ["wide, bf16, window", "segments, rows, lists of more than 32"]
)
def test_lowers_for_a_gpu(name):
  """No GPU is asked for."""
  form = FORMS[name]
  f = jax.jit(lambda *args: gpu.forward(*args, form.rule))
  made = jax.export.export(f, platforms=["cuda"])(*form.arrays())
  assert made.mlir_module().count("@mosaic_gpu_v2") == 1


@interpreted
def test_the_public_function_takes_it_on_hopper(monkeypatch):
  """Where all GPUs are Hopper; its derivative is that of XLA."""
  form = Form(marks=("kv_bias",))
  args = form.arrays()

  def kernels(platform, **how):
    def loss(q, k, v):
      found = ops.block_sparse_attention(q, k, v, *args[3:], **how)
      return found.out.astype(jnp.float32).sum()

    f = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    made = jax.export.export(f, platforms=[platform])(*args[:3])
    return made.mlir_module().count("@mosaic_gpu_v2")

  assert kernels("cuda") == 0, "this machine has no GPU"
  monkeypatch.setattr(ops, "on_hopper", lambda: True)
  assert kernels("cuda") == 1
  assert kernels("cuda", mass=True) == 0
  assert kernels("cpu") == 0


@interpreted
@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"dtype": "float32"}, "cast them"),
    ({"width": 32}, "pad them"),
    ({"value_width": 256}, "pad them"),
    ({"block_q": 32}, "multiples of 64"),
    ({"block_kv": 96}, "multiples of 64"),
    ({"rule": Rule(scale=0.0)}, "scale"),
  ],
)
def test_refuses(change, says):
  form = Form(**change)
  with pytest.raises(ValueError, match=says):
    gpu.forward(*form.arrays(), form.rule)


@interpreted
def test_refuses_mass():
  with pytest.raises(ValueError, match="mass"):
    gpu.forward(*Form().arrays(), mass=True)


@pytest.mark.skipif(
  jax.__version_info__ >= (0, 11), reason="jax is new enough for the kernel"
)
def test_refuses_an_old_jax():
  with pytest.raises(ValueError, match=r"jax >= 0\.11"):
    gpu.forward(*Form().arrays())
