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

from pallas_kernels.block_sparse_attention import (
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
    how = {"merge": self.merge, "depth": 2, "piece": 32, "parts": self.parts}
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
      *args, got.out, got.lse, dout, dlse, cut=back, **how
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
      np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=name)


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
  q_pos, kv_pos = np.tile(np.arange(t), (b, 1)), np.tile(np.arange(s), (b, g, 1))
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
    q_segment, kv_segment = (np.tile(x, (b, 1)) for x in (q_segment, kv_segment))
  bias = np.zeros((b, g, s))
  if "bias" in told:
    bias = np.where(rng.random(bias.shape) < 0.2, -np.inf, rng.normal(size=bias.shape))
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
    np.testing.assert_array_equal, ours((q, k, v, dout, dlse), lists, marks), clean
  )
