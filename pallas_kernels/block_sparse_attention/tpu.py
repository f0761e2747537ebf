# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on TPU, forward.

Bound by the matrix units where tiles are large, by the chain from scores to
maxima to weights where they are small.  The kernel is made for both:

* Steps pass through a pipeline: while the weights of one step are multiplied
  with its values, the scores of the next are made, in the same block of the
  schedule.  So matrix and vector units work at once.
* Scores lie transposed (`scores.py`), and so do sums: a maximum is of whole
  registers, what is known of a query is a row, and only the output of a tile is
  turned round, once.
* Several listed blocks make one step, loaded by hand (`stream.py`).
* Blocks that every query of a tile sees come first and need no mask.

Axes: as in `cuts` and `stream`; n columns of a piece of N.
"""

import dataclasses
import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import calls, plan, stream, tuned
from pallas_kernels.block_sparse_attention.cuts import Cut
from pallas_kernels.block_sparse_attention.plan import FLOOR, LOG2E, MARKS
from pallas_kernels.block_sparse_attention.scores import (
  Scores,
  dot,
  pieces,
  scaled,
)
from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  Attended,
  BlockLists,
  Marks,
  Rule,
)


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lists: BlockLists,
  marks: Marks = UNMARKED,
  rule: Rule = CAUSAL,
  *,
  mass: bool = False,
  cut: Cut | None = None,
  interpret: Any = False,
  debug: bool = False,
) -> Attended:
  """Attention over the listed blocks.

  Args:
    q, k, v, lists, marks, rule, mass: as in `reference`; all of one dtype.
    cut: how to cut the work; by the figures of the chip if not given.
    interpret: as in `pallas_call`: True or `pltpu.InterpretParams` off TPU.
    debug: check the bounds of every transfer.

  Raises:
    ValueError: lists that do not fit in scalar memory, or blocks in VMEM.
  """
  tuned.check(q, k, v, lists)
  cut = cut or tuned.forward_cut(q, k, v, lists, marks, mass=mass)
  q_marks = plan.queries(cut, marks, rule)
  k_marks = plan.keys(cut, marks)
  rows = plan.rows(cut, lists, q_marks, k_marks)
  make = calls.Operands(cut)
  key_marks = plan.key_marks(cut, marks, k_marks)
  inputs = {
    "q": make.tile(q),
    "query_marks": make.query_marks(plan.query_marks(cut, q_marks)),
  }
  if rows.bits is not None:
    inputs["bits"] = make.bits(rows.bits)
  if marks.sinks is not None:
    inputs["sinks"] = make.sinks(marks.sinks)
  inputs |= make.keys(k, v, marks, key_marks)
  width, value_width = q.shape[3], v.shape[3]
  places = math.ceil(2 * cut.words / MARKS) * MARKS
  stack = math.ceil(cut.stack / MARKS) * MARKS
  outputs = {
    "out": make.tile_out(value_width, q.dtype),
    "lse": make.rows_out(1, cut.columns),
  }
  f32 = lambda shape: pltpu.VMEM(shape, jnp.float32)
  scratch = {
    "scaled": pltpu.VMEM((cut.columns, width), q.dtype),
    "top": f32((1, cut.columns)),
    "total": f32((MARKS, cut.columns)),
    "sums": f32((value_width, cut.columns)),
    "scores": f32((cut.keys, cut.columns)),
    "score_top": f32((1, cut.columns)),
  }
  if mass:
    outputs["mass"] = make.rows_out(stack, places)
    scratch["given"] = f32((places, cut.columns))
    scratch["given_top"] = f32((places, cut.columns))
  scratch |= stream.scratch(cut, q.dtype, key_marks is not None)
  got = calls.run(
    functools.partial(_kernel, cut=cut, rule=rule, marks=_given(marks)),
    cut,
    rows,
    inputs,
    outputs,
    scratch,
    name="block_sparse_attention",
    flops=calls.flops(cut, width + value_width),
    interpret=interpret,
    debug=debug,
  )
  batch, heads, _, queries, *_ = cut.shape
  out = got["out"].reshape(batch, heads, -1, value_width)[:, :, :queries]
  lse = calls.of_queries(cut, got["lse"])
  if not mass:
    return Attended(out, lse)
  given = got["mass"][..., : cut.stack, : cut.lists[3]]
  return Attended(out, lse, _in_order(cut, given, rows))


def unfit(
  q: tuned.Shaped,
  k: tuned.Shaped,
  v: tuned.Shaped,
  lists: BlockLists,
  marks: Marks = UNMARKED,
) -> str | None:
  """Why the kernels, forward and backward, do not take it; None if they do."""
  try:
    tuned.check(q, k, v, lists)
    tuned.forward_cut(q, k, v, lists, marks, mass=True)
    tuned.backward_cut(q, k, v, lists, marks)
  except ValueError as error:
    return str(error)
  return None


def _given(marks: Marks) -> tuple[bool, bool]:
  """Whether there are segments, and biases."""
  return marks.q_segment is not None, marks.kv_bias is not None


def _in_order(cut: Cut, given: jax.Array, rows: plan.Rows) -> jax.Array:
  """Mass [B, M, Q, stack, C], from the order of the rows to that of lists."""
  batch, heads, *_ = cut.shape
  total = lax.shift_right_logical(rows.words[..., :1], 16)
  place = jnp.argsort(rows.order, axis=-1)
  live = place < total
  of_heads = lambda x: jnp.broadcast_to(
    jnp.repeat(x, heads // x.shape[1], axis=1), (batch, heads, *x.shape[2:])
  )
  given = jnp.moveaxis(given, 3, 2).reshape(batch, heads, *cut.lists[2:])
  given = jnp.take_along_axis(given, of_heads(place), axis=-1)
  return jnp.where(of_heads(live), given, 0)


def _kernel(refs: SimpleNamespace, *, cut: Cut, rule: Rule, marks: Any) -> None:
  """A tile of queries: all steps of its row.

  Scalars in SMEM: words, of `plan.Rows`; start of the part, i32[2].
  In: q, [stack, block_q, D]; query_marks, [8, N]; bits, [words, N]; sinks,
  [1, N]; in HBM k, v and key_marks.
  Out: out, [stack, block_q, E]; lse, [1, N]; mass, [stack up to 8, places].
  Scratch: queries times their factor, [N, D]; of each query the running
  maximum, [1, N], and total, [8, N] to be added up; sums, [E, N]; scores of the
  step to come, [W, N], and their maxima, [1, N]; with mass the totals of each
  entry and the maxima they are relative to, [places, N]; that of `stream`.
  """
  core, b, m, t = (pl.program_id(n) for n in range(4))
  keys = calls.stream_of(refs, cut, core)
  row = keys.row(b, m, t)
  tile = _Tile(refs, cut, rule, keys, row, *marks)

  pl.when((b == 0) & (m == 0) & (t == 0))(keys.open)
  refs.scaled[...] = scaled(refs.q, rule)
  tile.begin()
  keys.advance()  # for the first step; the others have their own

  @pl.when(row.total > 0)
  def some():
    slot = keys.take()
    plain = row.unmasked_steps
    pl.when(plain > 0)(lambda: tile.first(slot, masked=False))
    pl.when(plain == 0)(lambda: tile.first(slot, masked=True))
    for low, high, masked in (
      (0, plain - 1, False),
      (jnp.maximum(plain - 1, 0), row.steps - 1, True),
    ):
      step = functools.partial(tile.step, masked=masked)
      slot = lax.fori_loop(low, high, step, slot)
    tile.last(row.steps - 1, slot)

  pl.when(row.total == 0)(keys.skip)
  tile.end(cut.place(core, b, m, t)[2])


@dataclasses.dataclass(frozen=True)
class _Tile:
  """Online softmax of the queries of a tile."""

  refs: SimpleNamespace
  cut: Cut
  rule: Rule
  keys: stream.Stream
  row: stream.Row
  has_segments: bool
  has_bias: bool

  def begin(self) -> None:
    """Nothing seen yet but the sink."""
    top, total = self.refs.top, self.refs.total
    if self.refs.sinks is None:
      top[...] = jnp.full_like(top, FLOOR)
      total[...] = jnp.zeros_like(total)
    else:
      sink = self.refs.sinks[...]
      top[...] = jnp.maximum(sink, FLOOR)
      weight = jnp.exp2(sink - jnp.maximum(sink, FLOOR))
      first = lax.broadcasted_iota(jnp.int32, total.shape, 0) == 0
      total[...] = jnp.where(first, weight, 0.0)
    self.refs.sums[...] = jnp.zeros_like(self.refs.sums)

  def scores(self, step: Any, slot: Any, masked: bool) -> Scores:
    return Scores.of(
      self.refs, self.cut, self.rule, self.row, step, slot, masked,
      self.has_segments, self.has_bias,
    )  # fmt: skip

  def keep(self, scores: Scores, at: Any) -> None:
    """Makes the scores of a step, for the next one to use."""
    s, _ = scores.piece(at)
    self.refs.scores[:, at] = s
    self.refs.score_top[:, at] = s.max(0, keepdims=True)

  def weights(self, step: Any, at: Any) -> tuple[jax.Array, jax.Array]:
    """Weights of the kept scores, [W, n], and what shrinks older sums."""
    top, total = self.refs.top, self.refs.total
    old = top[:, at]
    new = jnp.maximum(old, self.refs.score_top[:, at])
    p = jnp.exp2(self.refs.scores[:, at] - new)
    shrink = jnp.exp2(old - new)
    top[:, at] = new
    parts = p.reshape(-1, MARKS, p.shape[1]).sum(0)
    total[:, at] = total[:, at] * shrink + parts
    if hasattr(self.refs, "mass"):
      for n in range(self.cut.merge):
        here = pl.ds(step * self.cut.merge + n, 1)
        of_block = p[n * self.cut.block_kv : (n + 1) * self.cut.block_kv]
        self.refs.given[here, at] = of_block.sum(0, keepdims=True)
        self.refs.given_top[here, at] = new
    return p.astype(self.refs.scaled.dtype), shrink

  def add(self, v: jax.Array, at: Any, p: jax.Array, shrink: jax.Array) -> None:
    sums = self.refs.sums
    sums[:, at] = sums[:, at] * shrink + dot(v, p, 0, 0)

  def first(self, slot: Any, *, masked: bool) -> None:
    """Fills the pipeline."""
    scores = self.scores(0, slot, masked)
    for at in pieces(self.cut):
      self.keep(scores, at)

  def step(self, step: Any, slot: Any, *, masked: bool) -> Any:
    """Adds a step, and makes the scores of the next: the slot of that."""
    following = self.keys.take()
    scores = self.scores(step + 1, following, masked)
    v = self.refs.v_vmem[slot]
    for at in pieces(self.cut):
      weights = self.weights(step, at)
      self.keep(scores, at)
      self.add(v, at, *weights)
    self.keys.advance()
    return following

  def last(self, step: Any, slot: Any) -> None:
    """Empties the pipeline."""
    v = self.refs.v_vmem[slot]
    for at in pieces(self.cut):
      self.add(v, at, *self.weights(step, at))

  def end(self, tile: Any) -> None:
    """Divides by the totals."""
    refs = self.refs
    total = refs.total[...].sum(0, keepdims=True)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    lse = (refs.top[...] + jnp.log2(safe)) / LOG2E
    refs.lse[...] = jnp.where(empty, -jnp.inf, lse)
    out = (refs.sums[...] / safe).T
    refs.out[...] = out.reshape(refs.out.shape).astype(refs.out.dtype)
    if hasattr(refs, "mass"):
      shrink = jnp.exp2(refs.given_top[...] - refs.top[...]) / safe
      place = lax.broadcasted_iota(jnp.int32, refs.given.shape, 0)
      live = place < self.row.total
      given = jnp.where(live, refs.given[...] * shrink, 0)
      refs.mass[...] = dot(self.owners(tile), given, 1, 1)

  def owners(self, tile: Any) -> jax.Array:
    """Which queries are of each head of the stack, f32[stack up to 8, N]."""
    shape = self.refs.mass.shape[0], self.cut.columns
    size = self.cut.block_q
    first = lax.broadcasted_iota(jnp.int32, shape, 0) * size
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    there = jnp.minimum(size, self.cut.shape[3] - tile * size)
    mine = (column >= first) & (column < first + there)
    return mine.astype(jnp.float32)
