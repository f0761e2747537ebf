# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on TPU, backward: all gradients in one pass.

With p the weights, and delta what the output and its cotangent have in common,

    ds = p (dp - delta + dlse),   dp = do v^T
    dv = p^T do,   dk = ds^T q,   dq = ds k

A pass over the lists of the forward one: dq is the sum of a tile, while dk and
dv of all keys stay in VMEM in f32 until their head is done.  So scores are made
once, products are five instead of the seven of two passes, no list is
transposed, and it does not matter how many tiles share a block.  Where keys are
too many for VMEM, the pass is made for some of them at a time, and their parts
of dq are added up.

Axes: as in `cuts` and `stream`; n columns of a piece of N, Z keys of a pass.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import calls, plan, stream, tuned
from pallas_kernels.block_sparse_attention.cuts import Cut
from pallas_kernels.block_sparse_attention.plan import LOG2E, MARKS
from pallas_kernels.block_sparse_attention.scores import (
  Scores,
  dot,
  factor,
  pieces,
  scaled,
)
from pallas_kernels.block_sparse_attention.types import BlockLists, Marks, Rule
from pallas_kernels.varying import alike

LANES = 128
AWAY = 1e30
"""The log of the total of a query that sees nothing: its weights are 0."""


def backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lists: BlockLists,
  marks: Marks,
  rule: Rule,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array | None,
  *,
  cut_and_blocks: tuple[Cut, int] | None = None,
  interpret: Any = False,
  debug: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
  """The gradients of q, k, v, `marks.kv_bias` and `marks.sinks`.

  Args:
    q, k, v, lists, marks, rule: as `tpu.forward` was given.
    out, lse: what it returned.
    dout, dlse: their cotangents; dlse may be None.
    cut_and_blocks: how to cut the work, and the key blocks of a pass; by the
      figures of the chip if not given.
    interpret, debug: as in `tpu.forward`.

  Raises:
    ValueError: as `tpu.forward`.
  """
  tuned.check(q, k, v, lists)
  if cut_and_blocks is None:
    cut_and_blocks = tuned.backward_cut(q, k, v, lists, marks)
  cut, blocks = cut_and_blocks
  seen = jnp.isfinite(lse)
  delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)
  if dlse is not None:
    delta = delta - jnp.where(seen, dlse, 0)
  dsinks = None
  if marks.sinks is not None:
    weight = jnp.exp(marks.sinks[:, None] - jnp.where(seen, lse, jnp.inf))
    dsinks = -(weight * delta).sum((0, 2)).astype(marks.sinks.dtype)
  make = calls.Operands(cut)
  q_marks, k_marks = plan.queries(cut, marks, rule), plan.keys(cut, marks)
  key_marks = plan.key_marks(cut, marks, k_marks)
  inputs = {
    "q": make.tile(q),
    "dout": make.tile(dout.astype(q.dtype)),
    "lse": make.row(jnp.where(seen, lse * LOG2E, AWAY), AWAY),
    "delta": make.row(delta, 0),
    "query_marks": make.query_marks(plan.query_marks(cut, q_marks)),
  }
  inputs_of_keys = make.keys(k, v, marks, key_marks)
  passes = -(-cut.blocks // blocks)
  bias = marks.kv_bias
  has_bias = bias is not None

  def some_keys(first):
    rows = plan.rows(cut, lists, q_marks, k_marks, (first, blocks))
    bits = {} if rows.bits is None else {"bits": make.bits(rows.bits)}
    got = calls.run(
      functools.partial(
        _kernel,
        cut=cut,
        rule=rule,
        has_segments=marks.q_segment is not None,
      ),
      cut,
      rows,
      inputs | bits | inputs_of_keys,
      _outputs(make, q, v, blocks, passes, has_bias),
      _scratch(cut, q, v, blocks, has_bias)
      | stream.scratch(cut, q.dtype, key_marks is not None),
      first=first,
      name="block_sparse_attention_backward",
      flops=calls.flops(cut, 3 * q.shape[3] + 2 * v.shape[3]) // passes,
      interpret=interpret,
      debug=debug,
    )
    return got.pop("dq"), got

  if passes == 1:
    dq, of_keys = some_keys(jnp.int32(0))
    of_keys = jax.tree.map(lambda x: x[None], of_keys)
  else:

    def add(dq, n):
      part, of_keys = some_keys(n * blocks)
      return dq + part, of_keys

    like = jnp.zeros(inputs["q"].array.shape, jnp.float32)
    like, *_ = alike((like, q, k, v, dout, lists.index))  # in `shard_map`
    dq, of_keys = lax.scan(add, like, jnp.arange(passes))
  dq = dq.astype(q.dtype).reshape(*q.shape[:2], -1, q.shape[3])
  dq = dq[:, :, : q.shape[2]]
  dk, dv = (_in_a_row(of_keys[n], 3, k.shape[2]) for n in ("dk", "dv"))
  dbias = None
  if bias is not None:
    dbias = _in_a_row(of_keys["dbias"][:, :, :, 0], 3, k.shape[2])
    dbias = dbias if bias.shape[1] > 1 else dbias.sum(1, keepdims=True)
    dbias = dbias if bias.shape[0] > 1 else dbias.sum(0, keepdims=True)
  return dq, dk, dv, dbias, dsinks


def _in_a_row(x: jax.Array, axis: int, size: int) -> jax.Array:
  """Passes [P, ..., Z, ...], with keys on `axis`, put one after another."""
  x = jnp.moveaxis(x, 0, axis - 1)
  x = x.reshape(*x.shape[: axis - 1], -1, *x.shape[axis + 1 :])
  return lax.slice_in_dim(x, 0, size, axis=axis - 1)


def _outputs(
  make: calls.Operands,
  q: jax.Array,
  v: jax.Array,
  blocks: int,
  passes: int,
  has_bias: bool,
) -> dict[str, calls.Operand]:
  """The gradients; a part of that of q is to be added up."""
  size = blocks * make.cut.block_kv
  outputs = {
    "dq": make.tile_out(q.shape[3], q.dtype if passes == 1 else jnp.float32),
    "dk": make.head_out(size, q.shape[3], q.dtype),
    "dv": make.head_out(size, v.shape[3], q.dtype),
  }
  if has_bias:
    outputs["dbias"] = make.head_out(MARKS, size, jnp.float32)
  return outputs


def _scratch(
  cut: Cut, q: jax.Array, v: jax.Array, blocks: int, has_bias: bool
) -> dict[str, Any]:
  """Sums in f32, and the queries times their factor."""
  size, width, value_width = blocks * cut.block_kv, q.shape[3], v.shape[3]
  f32 = lambda shape: pltpu.VMEM(shape, jnp.float32)
  scratch = {
    "scaled": pltpu.VMEM((cut.columns, width), q.dtype),
    "dq_sums": f32((width, cut.columns)),
    "dk_sums": f32((size, width)),
    "dv_sums": f32((size, value_width)),
  }
  if has_bias:
    scratch["dbias_sums"] = f32((size, LANES))
  return scratch


def _kernel(
  refs: SimpleNamespace, *, cut: Cut, rule: Rule, has_segments: bool
) -> None:
  """A tile of queries: all steps of its row.

  Scalars in SMEM: words, of `plan.Rows`; start of the part and first block of
  the pass, i32[3].
  In: q, [stack, block_q, D]; dout, [stack, block_q, E]; lse in units of log 2
  and delta, [1, N]; query_marks, [8, N]; bits, [words, N]; in HBM k, v and
  key_marks.
  Out: dq, [stack, block_q, D]; dk, [Z, D]; dv, [Z, E]; dbias, [8, Z].
  Scratch: queries times their factor, [N, D]; sums of dq, [D, N], of dk,
  [Z, D], of dv, [Z, E], and of dbias, [Z, 128] to be added up; that of
  `stream`.
  """
  core, b, m, t = (pl.program_id(n) for n in range(4))
  tiles = pl.num_programs(3)
  keys = calls.stream_of(refs, cut, core)
  row = keys.row(b, m, t)
  head = lax.rem(m, cut.per_key_head)
  tile = _Tile(refs, cut, rule, keys, row, has_segments)

  pl.when((b == 0) & (m == 0) & (t == 0))(keys.open)
  pl.when((head == 0) & (t == 0))(tile.begin_keys)
  refs.scaled[...] = scaled(refs.q, rule)
  refs.dq_sums[...] = jnp.zeros_like(refs.dq_sums)

  plain = row.unmasked_steps
  pl.loop(0, plain)(functools.partial(tile.step, masked=False))
  pl.loop(plain, row.steps)(functools.partial(tile.step, masked=True))

  @pl.when(row.total == 0)
  def none():
    keys.advance()
    keys.skip()

  width = refs.q.shape[-1]
  scale = width**-0.5 if rule.scale is None else rule.scale
  dq = (refs.dq_sums[...] * scale).T
  refs.dq[...] = dq.reshape(refs.dq.shape).astype(refs.dq.dtype)
  pl.when((head + 1 == cut.per_key_head) & (t + 1 == tiles))(
    lambda: tile.end_keys(scale / factor(rule, width))
  )


@dataclasses.dataclass(frozen=True)
class _Tile:
  """Gradients of the scores of a tile, and their sums."""

  refs: SimpleNamespace
  cut: Cut
  rule: Rule
  keys: stream.Stream
  row: stream.Row
  has_segments: bool

  @property
  def has_bias(self) -> bool:
    return hasattr(self.refs, "dbias")

  def blocks(self, body: Callable[[Any], None]) -> None:
    """`body(keys)` for each block of the pass: all at once is long code."""
    size = self.cut.block_kv

    @pl.loop(0, self.refs.dk_sums.shape[0] // size)
    def _(n):
      body(pl.ds(pl.multiple_of(n * size, size), size))

  def begin_keys(self) -> None:
    """Sums of a key head begin at 0."""
    names = ["dk_sums", "dv_sums"] + ["dbias_sums"] * self.has_bias

    @self.blocks
    def _(at):
      for name in names:
        sums = getattr(self.refs, name)
        sums[at, :] = jnp.zeros_like(sums[at, :])

  def end_keys(self, factor_of_k: float) -> None:
    """Sums of a key head leave."""
    refs = self.refs

    @self.blocks
    def _(at):
      dk, dv = refs.dk_sums[at, :] * factor_of_k, refs.dv_sums[at, :]
      refs.dk[at, :] = dk.astype(refs.dk.dtype)
      refs.dv[at, :] = dv.astype(refs.dv.dtype)

    if self.has_bias:
      ones = jnp.ones((MARKS, LANES), jnp.float32)
      refs.dbias[...] = dot(ones, refs.dbias_sums[...], 1, 1)

  def step(self, step: Any, *, masked: bool) -> None:
    """Adds the gradients of a step."""
    refs, cut = self.refs, self.cut
    slot = self.keys.take()
    scores = Scores.of(
      refs, cut, self.rule, self.row, step, slot, masked,
      self.has_segments, self.has_bias,
    )  # fmt: skip
    k, v = refs.k_vmem[slot], refs.v_vmem[slot]
    dout = refs.dout[...].reshape(cut.columns, -1)
    dk = dv = dbias = jnp.float32(0)
    for at in pieces(cut):
      here = slice(at.start, at.start + at.size)
      s, tanh = scores.piece(at)
      p = jnp.exp2(s - refs.lse[:, at])
      ds = p * (dot(v, dout[here], 1, 1) - refs.delta[:, at])
      if self.has_bias:
        dbias = dbias + _in_lanes(ds)
      if tanh is not None:
        ds = ds * (1 - tanh * tanh)
      p, ds = p.astype(k.dtype), ds.astype(k.dtype)
      dv = dv + dot(p, dout[here], 1, 0)
      dk = dk + dot(ds, refs.scaled[at, :], 1, 0)
      refs.dq_sums[:, at] += dot(k, ds, 0, 0)
    self.add(step, refs.dk_sums, dk)
    self.add(step, refs.dv_sums, dv)
    if self.has_bias:
      self.add(step, refs.dbias_sums, dbias)
    self.keys.advance()

  def add(self, step: Any, sums: Any, x: jax.Array) -> None:
    """Adds [W, width] to the sums of the blocks of a step."""
    size = self.cut.block_kv
    for n in range(self.cut.merge):
      block = self.row.block(step, n) - self.refs.start[2]
      at = pl.ds(pl.multiple_of(block * size, size), size)
      sums[at, :] += x[n * size : (n + 1) * size]


def _in_lanes(x: jax.Array) -> jax.Array:
  """Sums of columns [W, n] that are left to add up, [W, 128]."""
  spare = -x.shape[1] % LANES
  if spare:
    x = jnp.pad(x, ((0, 0), (0, spare)))
  total = x[:, :LANES]
  for n in range(LANES, x.shape[1], LANES):
    total += x[:, n : n + LANES]
  return total
