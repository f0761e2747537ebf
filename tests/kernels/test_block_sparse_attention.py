"""Law: the TPU kernels are `reference.block_sparse_attention`, and so is its
derivative that of `tpu_backward`.

A form is a program, compiled once for all of its data: marks that do nothing
(one segment, no bias) test the others one at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.block_sparse_attention import (
  cuts,
  ops,
  plan,
  reference,
  tpu,
  tpu_backward,
  tuned,
)
from pallas_kernels.block_sparse_attention.specs import COARSE, FINE, LONG
from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  Attended,
  BlockLists,
  Marks,
  Rule,
)

CHIPS = {
  "v5e": (pltpu.ChipVersion.TPU_V5E, 1),
  "v5p": (pltpu.ChipVersion.TPU_V5P, 2),
  "v6e": (pltpu.ChipVersion.TPU_V6E, 1),
}


@dataclasses.dataclass(frozen=True)
class Form:
  """Static sizes and options of a call, and how it is cut."""

  heads: int = 4
  key_heads: int = 2
  list_heads: int = 2
  queries: int = 44
  keys: int = 54
  block_q: int = 16
  block_kv: int = 8
  value_width: int = 8
  batch: int = 2
  rule: Rule = CAUSAL
  dtype: str = "float32"
  marked: bool = False
  mass: bool = False
  merge: int = 2
  depth: int = 2
  cores: int = 1
  split: str = "tiles"
  backward_split: str = "heads"
  parts: tuple[int, int] = (1, 1)
  blocks: int = 7
  width: int = 16
  capacity: int = 6

  @property
  def table(self):
    """Shape of a block mask, [B, L, Q, K]."""
    tiles = -(-self.queries // self.block_q)
    blocks = -(-self.keys // self.block_kv)
    return self.batch, self.list_heads, tiles, blocks

  def lists(self, mask, rows=None):
    """Of bool[B, L, Q, K]: at most `capacity`, past which comes rubbish."""
    order = np.argsort(~mask, axis=-1, kind="stable")[..., : self.capacity]
    count = np.minimum(mask.sum(-1), self.capacity)
    dead = np.arange(self.capacity) >= count[..., None]
    index = jnp.asarray(np.where(dead, 77, order), jnp.int32)
    count = jnp.asarray(count, jnp.int32)
    return BlockLists(index, count, rows, self.block_q, self.block_kv)

  def arrays(self):
    """q, k, v, and cotangents of the output and of its lse."""
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), self.dtype)
    b, h, g, t, s = (
      self.batch,
      self.heads,
      self.key_heads,
      self.queries,
      self.keys,
    )
    d, e = self.width, self.value_width
    dlse = normal(b, h, t).astype(jnp.float32)
    return (
      normal(b, h, t, d), normal(b, g, s, d), normal(b, g, s, e),
      normal(b, h, t, e), dlse,
    )  # fmt: skip

  def cuts(self, *args):
    """Of the forward and the backward call."""
    how = {
      "merge": self.merge,
      "depth": self.depth,
      "piece": 32,
      "parts": self.parts,
    }
    cut = tuned.forward_cut(*args)
    cut = dataclasses.replace(cut, **how, cores=self.cores, split=self.split)
    back, _ = tuned.backward_cut(*args)
    back = dataclasses.replace(
      back, **how, cores=self.cores, split=self.backward_split
    )
    return cut, (back, self.blocks)


FORMS = {
  "plain": Form(),
  "marked": Form(
    rule=Rule(True, window=30, softcap=2.0),
    marked=True,
    mass=True,
    list_heads=4,
    merge=1,
    blocks=3,
  ),
  "one list, bf16": Form(
    heads=8, key_heads=1, list_heads=1, dtype="bfloat16", block_kv=16,
    rule=Rule(False, scale=0.3), mass=True, parts=(2, 1), blocks=4,
    capacity=4,
  ),
  "two cores, parts": Form(
    batch=1, heads=4, key_heads=4, list_heads=4, cores=2, split="heads",
    parts=(1, 2), rule=Rule(False, window=9),
  ),
}  # fmt: skip


@functools.cache
def programs(form, interpret=True):
  """(arrays, lists, marks) -> values, gradients: ours, and the reference's."""

  def want(arrays, lists, marks):
    q, k, v, dout, dlse = arrays

    def attend(q, k, v, bias, sinks):
      told = marks._replace(kv_bias=bias, sinks=sinks)
      got = reference.block_sparse_attention(
        q, k, v, lists, told, form.rule, mass=form.mass
      )
      finite = jnp.where(jnp.isfinite(got.lse), got.lse, 0)
      return (got.out.astype(jnp.float32), finite), got

    _, back, got = jax.vjp(
      attend, q, k, v, marks.kv_bias, marks.sinks, has_aux=True
    )
    return got, back((dout.astype(jnp.float32), dlse))

  def ours(arrays, lists, marks):
    q, k, v, dout, dlse = arrays
    cut, back = form.cuts(q, k, v, lists, marks)
    how = {"interpret": interpret, "debug": True}
    args = q, k, v, lists, marks, form.rule
    got = tpu.forward(*args, mass=form.mass, cut=cut, **how)
    grads = tpu_backward.backward(
      *args, got.out, got.lse, dout, dlse, cut_and_blocks=back, **how
    )
    return got, grads

  return jax.jit(ours) if interpret is True else ours, jax.jit(want)


def compare(form, lists, marks=UNMARKED, interpret=True, arrays=None):
  """Values and gradients of both; those of ours."""
  arrays = arrays or form.arrays()
  ours, want = programs(form, interpret)
  got, grads = ours(arrays, lists, marks)
  expected, expected_grads = want(arrays, lists, marks)
  tolerance = 1e-5 if form.dtype == "float32" else 2e-2
  close(got, expected, Attended._fields, tolerance)
  names = ("dq", "dk", "dv", "dbias", "dsinks")
  close(grads, expected_grads, names, tolerance)
  return got, grads


def close(got, want, names, tolerance):
  for name, a, b in zip(names, got, want):
    assert (a is None) == (b is None), name
    if a is not None:
      assert a.shape == b.shape and a.dtype == b.dtype, name
      a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
      np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), name)
      a, b = (np.where(np.isneginf(x), 0, x) for x in (a, b))
      scale = 1 + np.abs(b).max()
      np.testing.assert_allclose(
        a, b, rtol=0, atol=tolerance * scale, err_msg=name
      )


RACES = {
  "several blocks": dataclasses.replace(FORMS["plain"], batch=1, heads=2),
  "marks": dataclasses.replace(
    FORMS["marked"], batch=1, heads=2, list_heads=2, depth=4, queries=30
  ),
}


@pytest.mark.parametrize("form", RACES.values(), ids=RACES)
def test_no_races(form):
  """And no load is used before it has come: what has not is NaN."""
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  marks, looks = UNMARKED, None
  if form.marked:
    marks, looks = marks_for(form, ALL)
    marks = marks._replace(kv_bias=jnp.maximum(marks.kv_bias, -50))
  lists = form.lists(masks(form, "random"), looks)
  q, k, v, dout, dlse = form.arrays()
  args = q, k, v, lists, marks, form.rule
  cut, back = form.cuts(q, k, v, lists, marks)
  how = {"interpret": params, "debug": True}
  got = tpu.forward(*args, mass=form.mass, cut=cut, **how)
  assert not found_races()
  grads = tpu_backward.backward(
    *args, got.out, got.lse, dout, dlse, cut_and_blocks=back, **how
  )
  assert not found_races()
  want, want_grads = programs(form)[1](form.arrays(), lists, marks)
  close(got, want, Attended._fields, 1e-5)
  close(grads, want_grads, ("dq", "dk", "dv", "dbias", "dsinks"), 1e-5)


def found_races():
  """What the interpreter's detector says of the last kernel."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as module

  return module.races.races_found


def masks(form, kind):
  mask = np.random.default_rng(2).random(form.table) < 0.4
  if kind == "a sink block":
    mask[..., 0] = True
  elif kind == "empty rows":
    mask[:, :, 1] = False
    mask[:, 0] = False
  elif kind == "all":
    mask[:] = True
  elif kind == "none":
    mask[:] = False
  elif kind == "one block":
    mask[:] = np.arange(form.table[-1]) == 2
  return mask


KINDS = "random", "a sink block", "empty rows", "all", "none", "one block"


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind):
  form = FORMS["plain"]
  got, grads = compare(form, form.lists(masks(form, kind)))
  if kind == "none":
    assert not got.out.any() and np.isneginf(got.lse).all()
    assert not any(np.any(x) for x in grads[:3])


@pytest.mark.parametrize("kind", ("random", "empty rows"))
@pytest.mark.parametrize("name", ("one list, bf16", "two cores, parts"))
def test_other_forms(name, kind):
  form = FORMS[name]
  compare(form, form.lists(masks(form, kind)))


def marks_for(form, told):
  """Marks of which only those `told` do something, and rows."""
  rng = np.random.default_rng(3)
  b, g, t, s = form.batch, form.key_heads, form.queries, form.keys
  q_pos, kv_pos = (
    np.tile(np.arange(t), (b, 1)),
    np.tile(np.arange(s), (b, g, 1)),
  )
  if "positions" in told:
    q_pos = np.stack([rng.permutation(60)[:t] for _ in range(b)])
    kv_pos = rng.permuted(kv_pos, axis=-1)
    q_pos[rng.random(q_pos.shape) < 0.1] = -1
    kv_pos[rng.random(kv_pos.shape) < 0.2] = -1
  if "sorted positions" in told:  # whole blocks are seen, others not at all
    kv_pos = np.tile(np.arange(s) - 20, (b, g, 1))
    kv_pos[kv_pos < 0] = -1
  q_segment, kv_segment = np.zeros((b, t)), np.zeros((b, s))
  if "segments" in told:
    q_segment, kv_segment = np.arange(t) // 17, np.arange(s) // 17
    q_segment, kv_segment = (
      np.tile(x, (b, 1)) for x in (q_segment, kv_segment)
    )
  bias = np.zeros((b, g, s))
  if "bias" in told:
    bias = np.where(
      rng.random(bias.shape) < 0.2, -np.inf, rng.normal(size=bias.shape)
    )
  sinks = np.full(form.heads, -np.inf)
  if "sinks" in told:
    sinks = rng.normal(size=form.heads) * 5
  looks = np.ones((*form.table[:3], form.capacity, form.block_q), bool)
  if "rows" in told:
    looks = rng.random(looks.shape) < 0.6
    looks[0, 0] = False
  ints = lambda x: jnp.asarray(x, jnp.int32)
  floats = lambda x: jnp.asarray(x, jnp.float32)
  marks = Marks(
    ints(q_pos), ints(kv_pos), ints(q_segment), ints(kv_segment),
    floats(bias), floats(sinks),
  )  # fmt: skip
  return marks, jnp.asarray(looks)


ALL = ("positions", "segments", "bias", "sinks", "rows")


@pytest.mark.parametrize(
  "told",
  [(), *((x,) for x in ALL), ("sorted positions",), ALL],
  ids=lambda x: "+".join(x) or "nothing",
)
def test_marks(told):
  form = FORMS["marked"]
  marks, looks = marks_for(form, told)
  if "sinks" not in told:  # the reference's derivative of exp(-inf - -inf)
    marks = marks._replace(sinks=jnp.full(form.heads, -1e4))
  lists = form.lists(masks(form, "empty rows"), looks)
  if "bias" not in told:
    compare(form, lists, marks)
    return
  marks = marks._replace(kv_bias=jnp.maximum(marks.kv_bias, -50))
  compare(form, lists, marks)


def test_what_is_no_key_and_what_is_not_listed_reach_nothing():
  form = FORMS["marked"]
  marks, looks = marks_for(form, ("positions",))
  marks = marks._replace(sinks=jnp.zeros(form.heads))
  mask = masks(form, "random")
  mask[..., 3] = False
  lists = form.lists(mask, looks)
  q, k, v, dout, dlse = form.arrays()
  gone = marks.kv_pos[..., None] < 0
  ours, _ = programs(form)
  clean = ours((q, k, v, dout, dlse), lists, marks)
  k, v = (jnp.where(gone, jnp.nan, x) for x in (k, v))
  at = slice(3 * form.block_kv, 4 * form.block_kv)
  k, v = k.at[:, :, at].set(jnp.nan), v.at[:, :, at].set(jnp.nan)
  jax.tree.map(
    np.testing.assert_array_equal,
    ours((q, k, v, dout, dlse), lists, marks),
    clean,
  )


def test_equals_splash_with_lists_built_by_hand():
  """jax's own kernel, told which blocks: an oracle that shares no code."""
  heads, key_heads, tokens, width, size = 2, 1, 256, 128, 128
  rng = np.random.default_rng(4)
  normal = lambda h: jnp.asarray(
    rng.normal(size=(1, h, tokens, width)), "float32"
  )
  q, k, v = normal(heads), normal(key_heads), normal(key_heads)
  index = np.array([[[0, 0], [0, 1]], [[0, 0], [1, 1]]])  # [H, Q, C]
  count = np.array([[1, 2], [1, 1]])
  lists = BlockLists(
    jnp.asarray(index, jnp.int32)[None], jnp.asarray(count, jnp.int32)[None],
    None, size, size,
  )  # fmt: skip
  segment = jnp.asarray(np.arange(tokens) // 90, jnp.int32)
  marks = Marks(q_segment=segment[None], kv_segment=segment[None])
  live = np.arange(2) < count[..., None]
  info = splash.splash_attention_mask_info.MaskInfo(
    data_next=jnp.asarray(index, jnp.int32),
    mask_next=None,
    block_mask=jnp.asarray(live, jnp.int32),
    partial_mask_blocks=None,
    q_sequence=jnp.arange(tokens, dtype=jnp.int32),
  )
  module = splash.splash_attention_kernel
  kernel = module.SplashAttentionKernel(
    info, None, None,
    block_sizes=module.BlockSizes(size, size, size),
    is_mqa=False,
    save_residuals=False,
    mask_value=module.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=None,
    mask_function=lambda at, pos: at >= pos,
    interpret=True,
  )  # fmt: skip
  ids = module.SegmentIds(segment, segment)
  want = kernel(q[0] * width**-0.5, k[0], v[0], ids)
  got = tpu.forward(q, k, v, lists, marks, interpret=True).out[0]
  # A row that sees nothing is 0 here, and the mean of the values there.
  segments = np.asarray(segment)
  empty = np.zeros((heads, tokens), bool)
  empty[1, size:] = segments[size:] < segments[size]
  np.testing.assert_allclose(
    np.where(empty[..., None], 0, got),
    np.where(empty[..., None], 0, want),
    atol=1e-5,
  )


def test_steps_are_as_many_as_blocks_seen():
  """What lies above the diagonal is left out, and what is below is unmasked."""
  form = FORMS["plain"]
  lists = form.lists(np.ones(form.table, bool))
  cut, _ = form.cuts(*form.arrays()[:3], lists, UNMARKED)
  rows = plan.rows(
    cut, lists, plan.queries(cut, UNMARKED, CAUSAL), plan.keys(cut, UNMARKED)
  )
  total, unmasked = (
    rows.words[0, 0, :, 0] >> 16,
    rows.words[0, 0, :, 0] & 0xFFFF,
  )
  np.testing.assert_array_equal(total, [2, 4, 6])
  np.testing.assert_array_equal(unmasked, [0, 2, 4])
  blocks = np.asarray(rows.words[0, 0, 2, 1:])
  np.testing.assert_array_equal(
    np.stack([blocks & 0xFFFF, blocks >> 16], 1).ravel(), np.arange(6)
  )


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("spec", (COARSE, FINE, LONG), ids=lambda x: x.name)
def test_cuts_fit(chip, spec):
  info = pltpu.get_tpu_info_for_chip(*CHIPS[chip])
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
  q = shape(1, spec.heads, spec.tokens, spec.width)
  k = shape(1, spec.key_heads, spec.tokens, spec.width)
  cut = tuned.forward_cut(q, k, k, spec.lists(), UNMARKED, info=info)
  back, blocks = tuned.backward_cut(q, k, k, spec.lists(), UNMARKED, info=info)
  for c in (cut, back):
    assert c.vmem_limit_bytes <= info.vmem_capacity_bytes
    assert np.prod(c.part_rows) * c.words <= cuts.MOST_WORDS
    assert np.prod(c.extent) * c.cores == np.prod(c.part)
  assert blocks == back.blocks or spec is LONG


@pytest.mark.parametrize(
  "lists, heads, want",
  [
    ((1, 8, 64, 64), 8, (1, 1)),
    ((1, 8, 1024, 64), 8, (1, 2)),
    ((4, 8, 1024, 64), 2, (4, 2)),
    ((4, 1, 1024, 256), 1, (4, 1)),
  ],
)
def test_long_lists_are_cut_into_parts(lists, heads, want):
  assert cuts.parts(lists, 4, heads) == want


def test_too_long_lists():
  with pytest.raises(ValueError, match="use larger blocks"):
    cuts.parts((1, 1, 1024, 1024), 4, 1)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"block_q": 12}, "multiples of 8"),
    ({"block_kv": 4}, "multiples of 8"),
    ({"dtype": "float16"}, "bfloat16 or float32"),
    ({"block_kv": 1 << 20, "keys": 1 << 21}, "do not fit"),
  ],
  ids=str,
)
def test_what_does_not_fit(change, message):
  form = dataclasses.replace(FORMS["plain"], **change)
  q = jax.ShapeDtypeStruct((2, 4, 44, 16), form.dtype)
  k = jax.ShapeDtypeStruct((2, 2, form.keys, 16), form.dtype)
  index = jnp.zeros((2, 2, 3, 6), jnp.int32)
  lists = BlockLists(index, index[..., 0], None, form.block_q, form.block_kv)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda q, k: tpu.forward(q, k, k, lists), q, k)
  assert message in (tpu.unfit(q, k, k, lists, UNMARKED) or "")
  assert (
    tpu.unfit(
      *FORMS["plain"].arrays()[:3],
      FORMS["plain"].lists(masks(FORMS["plain"], "all")),
      UNMARKED,
    )
    is None
  )


@pytest.mark.parametrize("name", ("plain", "marked"))
def test_lowers_for_tpu(name):
  """The compiler of TPUs takes it as it is, with the cut of the rule."""
  form = dataclasses.replace(
    FORMS[name], block_q=128, block_kv=128, queries=384, keys=768
  )
  marks, looks = marks_for(form, ()) if form.marked else (UNMARKED, None)
  lists = form.lists(masks(form, "random"), looks)

  def run(q, k, v, dout, dlse):
    args = q, k, v, lists, marks, form.rule
    got = tpu.forward(*args, mass=form.mass)
    return tpu_backward.backward(*args, got.out, got.lse, dout, dlse)

  module = jax.export.export(jax.jit(run), platforms=["tpu"])(*form.arrays())
  assert module.mlir_module().count("tpu_custom_call") == 2


@pytest.mark.parametrize("sharded", [False, True], ids=["", "in shard_map"])
def test_the_public_function_is_the_kernel_on_a_tpu_and_xla_elsewhere(sharded):
  q = jnp.ones((1, 2, 128, 128), jnp.bfloat16)
  mask = jnp.ones((1, 1, 1, 1), jnp.int32)
  lists = BlockLists(0 * mask, mask[..., 0], None, 128, 128)

  def attend(q):
    return ops.block_sparse_attention(q, q, q, lists).out

  if sharded:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    spec = {"in_specs": P("data"), "out_specs": P("data")}
    attend = jax.shard_map(attend, mesh=mesh, **spec)

  def kernels(platform):
    loss = lambda q: attend(q).astype(jnp.float32).sum()
    module = jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])
    return module(q).mlir_module().count("tpu_custom_call")

  assert kernels("tpu") == 2
  assert kernels("cpu") == kernels("cuda") == 0
