# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on TPU, forward.

Axes: as in `plan` and `stream`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import plan, tuned
from pallas_kernels.block_sparse_attention.plan import FLOOR, LOG2E, MARKS, Cut
from pallas_kernels.block_sparse_attention.scores import Scores, dot, factor
from pallas_kernels.block_sparse_attention.stream import Stream, scratch
from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  Attended,
  BlockLists,
  Marks,
  Rule,
)


def cut_for(q, k, v, lists, marks, merge=None, depth=2) -> Cut:
  b, h, t, d = q.shape
  g, s, e = v.shape[1:]
  shape = (b, h, g, t, s, d, e)
  ls = plan.list_shape(shape, lists, marks)
  merge = merge or tuned.merge(lists.block_kv, ls[3])
  parts = plan.parts(ls, merge, ls[1])
  return Cut(shape, ls, lists.block_q, lists.block_kv, merge, depth, parts)


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lists: BlockLists,
  marks: Marks = UNMARKED,
  rule: Rule = CAUSAL,
  *,
  mass: bool = False,
  interpret: Any = False,
  debug: bool = False,
  piece=256, merge=None, depth=4,
) -> Attended:
  cut = cut_for(q, k, v, lists, marks, merge, depth)
  b, h, g, t, s, d, e = cut.shape
  m = h // cut.stack
  if marks.kv_pos is not None:
    some = (marks.kv_pos >= 0)[..., None]
    k, v = jnp.where(some, k, 0), jnp.where(some, v, 0)
  qs = plan.queries(cut, marks, rule)
  ks = plan.keys(cut, marks)
  rows = plan.rows(cut, lists, qs, ks)
  qm = plan.query_marks(cut, qs)
  km = plan.key_marks(cut, marks, ks)
  padq = cut.tiles * cut.block_q - t
  pads = cut.blocks * cut.block_kv - s
  pad = lambda x, n: x if n == 0 else jnp.pad(x, ((0, 0), (0, 0), (0, n), (0, 0)))
  q, k, v = pad(q, padq), pad(k, pads), pad(v, pads)
  q = q.reshape(b, m, cut.stack, -1, d)
  words, starts = plan.in_parts(cut, rows.words)
  hbm = [k, v] + ([] if km is None else [km])
  sinks = []
  if marks.sinks is not None:
    x = jnp.repeat(marks.sinks * LOG2E, cut.block_q).reshape(m, 1, cut.columns)
    sinks = [x]
  bits = [] if rows.bits is None else [rows.bits]

  def place(c, i, j, l, start):
    if cut.split == "tiles":
      l = l * cut.cores + c
    elif cut.split == "heads":
      j = j + c * cut.extent[1]
    else:
      i = i + c * cut.extent[0]
    return i, j, l

  def spec(block, index):
    def index_map(c, i, j, l, words, start):
      i, j, l = place(c, i, j, l, start)
      return index(i + start[0], j + start[1], l)
    return pl.BlockSpec(block, index_map)
  def ospec(block, index):
    def index_map(c, i, j, l, words, start):
      return index(*place(c, i, j, l, start))
    return pl.BlockSpec(block, index_map)

  N = cut.columns
  sh = cut.part[1] // cut.part_rows[1]
  def lrow(i, j, l):
    return (0 if cut.lists[0] == 1 else i), (j if sh == 1 else lax.div(j, sh)), l, 0, 0
  in_specs = [
    spec((None, None, cut.stack, cut.block_q, d), lambda i, j, l: (i, j, 0, l, 0)),
    spec((None, None, MARKS, N), lambda i, j, l: (0 if qm.shape[0] == 1 else i, l, 0, 0)),
    *[spec((None, None, None, x.shape[3], N), lrow) for x in bits],
    *[spec((None, 1, N), lambda i, j, l: (j, 0, 0)) for x in sinks],
    *[pl.BlockSpec(memory_space=pl.ANY) for x in hbm],
  ]
  pb, pm, pt = cut.part
  out_shape = [
    jax.ShapeDtypeStruct((pb, pm, cut.stack, pt * cut.block_q, e), q.dtype),
    jax.ShapeDtypeStruct((pb, pm, pt, 1, N), jnp.float32),
  ]
  out_specs = [
    ospec((None, None, cut.stack, cut.block_q, e), lambda i, j, l: (i, j, 0, l, 0)),
    ospec((None, None, None, 1, N), lambda i, j, l: (i, j, l, 0, 0)),
  ]
  scr = [
    pltpu.VMEM((N, d), q.dtype),
    pltpu.VMEM((1, N), jnp.float32),
    pltpu.VMEM((8, N), jnp.float32),
    pltpu.VMEM((e, N), jnp.float32),
    pltpu.VMEM((cut.keys, N), jnp.float32),
    pltpu.VMEM((1, N), jnp.float32),
    *scratch(cut, q.dtype, km is not None),
  ]
  kernel = functools.partial(_kernel, cut=cut, rule=rule, piece=min(piece, N), has_bits=bool(bits), has_sinks=bool(sinks), marked=km is not None,
    has_segments=marks.q_segment is not None, has_bias=marks.kv_bias is not None)
  def call(words, start):
    return pl.pallas_call(
      kernel,
      out_shape=out_shape,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(cut.cores, *cut.extent),
        in_specs=in_specs, out_specs=out_specs, scratch_shapes=scr),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
        disable_bounds_checks=not debug,
        vmem_limit_bytes=64<<20,
      ),
      interpret=interpret,
      name="block_sparse_attention",
    )(words, start, q, qm, *bits, *sinks, *hbm)
  if len(words) == 1:
    out, lse = call(words[0], starts[0])
  else:
    out, lse = lax.map(lambda x: call(*x), (words, starts))
  out = out.reshape(b, h, -1, e)[:, :, :t]
  lse = lse.reshape(b, m, cut.tiles, cut.stack, cut.block_q)
  lse = jnp.moveaxis(lse, 3, 2).reshape(b, h, -1)[:, :, :t]
  return Attended(out, lse)


def _kernel(*refs, cut, rule, piece, has_bits, has_sinks, marked, has_segments, has_bias):
  refs = list(refs)
  take = lambda n: [refs.pop(0) for _ in range(n)]
  words, start = take(2)
  q_ref, qm_ref = take(2)
  bits = take(1)[0] if has_bits else None
  sinks = take(1)[0] if has_sinks else None
  hbm = take(3 if marked else 2)
  out_ref, lse_ref = take(2)
  q_s, m_s, l_s, acc_s, s_s, c_s = take(6)
  vmem = take(3 if marked else 2)
  sems, cursor = take(2)
  core, b, m, t = (pl.program_id(n) for n in range(4))
  stream = Stream(cut, words, start, tuple(hbm), tuple(vmem), sems, cursor, core)
  row = stream.row(b, m, t)

  @pl.when((b == 0) & (m == 0) & (t == 0))
  def _():
    stream.open()

  N, D = q_s.shape
  q = q_ref[...].reshape(N, D).astype(jnp.float32) * factor(rule, D)
  q_s[...] = q.astype(q_s.dtype)
  if has_sinks:
    sink = sinks[...]
    top = jnp.maximum(sink, FLOOR)
    m_s[...] = top
    first = lax.broadcasted_iota(jnp.int32, l_s.shape, 0) == 0
    l_s[...] = jnp.where(first, jnp.exp2(sink - top), 0.0)
  else:
    m_s[...] = jnp.full_like(m_s, FLOOR)
    l_s[...] = jnp.zeros_like(l_s)
  acc_s[...] = jnp.zeros_like(acc_s)

  W = cut.keys
  pieces = [pl.ds(c, min(piece, N - c)) for c in range(0, N, piece)]

  def scores(i, slot, masked):
    marks = vmem[2].at[slot] if marked else None
    sc = Scores(cut, rule, vmem[0][slot], q_s, qm_ref, marks, bits, row, i, masked, has_segments, has_bias)
    keys = sc.columns() if masked or has_bias else []
    return lambda at: sc.piece(at, keys)[0]

  def produce(make, at):
    s = make(at)
    s_s[:, at] = s
    c_s[:, at] = s.max(0, keepdims=True)

  def weigh(at):
    old = m_s[:, at]
    new = jnp.maximum(old, c_s[:, at])
    p = jnp.exp2(s_s[:, at] - new)
    alpha = jnp.exp2(old - new)
    m_s[:, at] = new
    l_s[:, at] = l_s[:, at] * alpha + p.reshape(-1, 8, p.shape[1]).sum(0)
    return p.astype(q_s.dtype), alpha

  def add(v, at, p, alpha):
    acc_s[:, at] = acc_s[:, at] * alpha + dot(v, p, 0, 0)

  def body(i, slot, masked):
    following = stream.take()
    make = scores(i + 1, following, masked)
    v = vmem[1][slot]
    for at in pieces:
      p, alpha = weigh(at)
      produce(make, at)
      add(v, at, p, alpha)
    stream.advance()
    return following

  steps, plain = row.steps, row.unmasked_steps

  @pl.when(row.total > 0)
  def _():
    slot = stream.take()
    for masked in (False, True):
      @pl.when((plain == 0) == masked)
      def _():
        make = scores(0, slot, masked)
        for at in pieces:
          produce(make, at)
    stream.advance()
    slot = lax.fori_loop(0, plain - 1, lambda i, s: body(i, s, False), slot)
    slot = lax.fori_loop(jnp.maximum(plain - 1, 0), steps - 1, lambda i, s: body(i, s, True), slot)
    v = vmem[1][slot]
    for at in pieces:
      p, alpha = weigh(at)
      add(v, at, p, alpha)

  @pl.when(row.total == 0)
  def _():
    stream.advance()
    stream.take(live=False)

  l = l_s[...].sum(0, keepdims=True)
  empty = l == 0
  inv = 1 / jnp.where(empty, 1, l)
  lse_ref[...] = jnp.where(empty, -jnp.inf, (m_s[...] + jnp.log2(jnp.where(empty, 1, l))) / LOG2E)
  out = (acc_s[...] * inv).T
  out_ref[...] = out.reshape(out_ref.shape).astype(out_ref.dtype)
