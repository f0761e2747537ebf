# SPDX-License-Identifier: Apache-2.0
"""Sparse decode attention on TPU: listed pages by hand-made transfers.

It is bound by memory, so the kernel is a stream: pages are gathered into wide
blocks of a ring of buffers that runs on over the borders of lists, and while
one block is attended, the next ones are on their way.  One transfer brings a
page of all key heads that share a list.

What is known by slot (who sees it, bias, scales) XLA gathers beforehand into a
row per list: 4 bytes beside the hundreds of a key.  A list ends at the last
slot that anyone sees, so a short sequence in a long cache costs its length.

Axes: B batch, H query heads, G key heads, T queries, L heads that own a list,
W work items (rows of the batch and lists), n key heads of an item, R queries of
a key head (H / G * T, or T where query heads have lists), M pieces of g slots,
X = M * g slots of a list, C slots of a block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.types import (
  NEVER,
  Attended,
  Marks,
  Rule,
)
from pallas_kernels.sparse_decode_attention.pieces import (
  length,
  locate,
  read,
  seen,
)
from pallas_kernels.sparse_decode_attention.stream import Plan, Stream
from pallas_kernels.sparse_decode_attention.tuned import (
  LANES,
  MOST_SCALARS,
  Blocks,
  all_of,
  blocks,
  divisor,
)
from pallas_kernels.sparse_decode_attention.types import Units
from pallas_kernels.varying import result


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  units: Units | None,
  marks: Marks,
  rule: Rule,
  *,
  page_table: jax.Array | None,
  k_scale: jax.Array | None,
  v_scale: jax.Array | None,
  mass: bool,
  cut: Blocks | None = None,
  interpret: Any = False,
  debug: bool = False,
) -> Attended:
  """Arguments as in `ops`; sizes must fit (`tuned.blocks`).

  Args:
    cut: how to cut the work; by the figures of the chip if None.
    interpret: as in `pallas_call`: True or `pltpu.InterpretParams` off TPU.
    debug: check the bounds of every transfer.
  """
  cut = cut or blocks(q, k, v, units, page_table)
  if cut is None:
    raise ValueError(f"no transfers for {k.dtype} {k.shape}: see `tuned`.")
  listed = units is not None
  units = units if listed else all_of(k, page_table, cut)
  batch, heads, queries, _ = q.shape
  slots, groups = length(k, page_table), k.shape[1]
  pieces = locate(units, k, page_table, batch)
  lists, count, size = pieces.slot.shape[1:]
  owners = max(groups, lists)
  visible, bias = seen(pieces, marks, rule, queries, slots)
  rows = q.reshape(batch, owners, -1, q.shape[3])
  scales = [
    None if scale is None else read(scale, pieces, owners)
    for scale in (k_scale, v_scale)
  ]
  work = _Work(
    rows, pieces.lead, pieces.start, _marks(visible, bias, rows), *scales
  )
  held = groups if lists == 1 else lists
  most = max(MOST_SCALARS // (held * (2 * count + 8)), 1)
  call = functools.partial(
    _call,
    pooled=page_table is not None,
    k=k,
    v=v,
    rule=rule,
    mass=mass,
    interpret=interpret,
    debug=debug,
  )
  rows_of = lambda low: jax.tree.map(lambda a: a[low : low + most], work)
  parts = [call(rows_of(low), low, cut=cut) for low in range(0, batch, most)]
  out, lse, scores = (jnp.concatenate(part) for part in zip(*parts))
  out = out.reshape(batch, heads, queries, -1)
  lse = lse.reshape(batch, heads, queries)
  if marks.sinks is not None:
    wide = jnp.logaddexp(lse, marks.sinks[:, None])
    out, lse = out * jnp.exp(lse - wide)[..., None], wide
  out = out.astype(q.dtype)
  if not mass:
    return Attended(out, lse, None)
  scores = scores[..., : count * size].reshape(batch, heads, queries, -1)
  safe = jnp.where(lse == -jnp.inf, 0, lse)[..., None]
  weights = jnp.where(scores > NEVER / 2, jnp.exp(scores - safe), 0).sum(2)
  if listed:
    entries = units.index.shape[2]
    weights = weights.reshape(batch, heads, entries, -1).sum(-1)
  return Attended(out, lse, weights)


class _Work(NamedTuple):
  """What differs between rows of the batch.

  Attributes:
    q: [B, n, R, D] of the n heads that are gathered.
    lead, start: of the pieces, i32[B, L, M].
    marks: added to scores, NEVER where not seen, f32[B, 1 or n, 1 or R, X].
    k_scale, v_scale: f32[B, n, X].
  """

  q: jax.Array
  lead: jax.Array
  start: jax.Array
  marks: jax.Array
  k_scale: jax.Array | None
  v_scale: jax.Array | None


def _marks(visible, bias, rows) -> jax.Array:
  """See `_Work`; one row of them serves all queries where there is one."""
  marks = jnp.where(visible, 0.0, NEVER)
  if bias is not None:
    marks = jnp.where(visible, jnp.maximum(bias[:, :, None], NEVER), NEVER)
  queries = marks.shape[2]
  if queries == 1:
    return marks
  return jnp.tile(marks, (1, 1, rows.shape[2] // queries, 1))


def _call(work, first_row, *, k, v, cut, pooled, rule, mass, interpret, debug):
  """The kernel: out [W, n', R, E] and lse [W, n', R], f32, and the scores."""
  batch, owners, rows, width = work.q.shape
  lists, count = work.start.shape[1:]
  splits = owners // cut.heads
  items, per_block = batch * splits, cut.slots // cut.piece
  cores = cut.cores if items % cut.cores == 0 else 1
  steps = items // cores // divisor(items // cores, cut.items)
  each = items // cores // steps
  rounds = -(-count // per_block)
  slots = rounds * cut.slots

  def pad(a, to, fill=0):
    pads = [(0, 0)] * (a.ndim - 1) + [(0, to - a.shape[-1])]
    return jnp.pad(a, pads, constant_values=fill)

  # By item; lists and marks that all heads share are there once.
  lists_each = cut.heads if lists > 1 else 1
  marks_each = cut.heads if work.marks.shape[1] > 1 else 1

  def by_item(a, heads):
    a = jnp.broadcast_to(a, (batch, splits * heads, *a.shape[2:]))
    return a.reshape(items, heads, *a.shape[2:])

  marks = by_item(pad(work.marks, slots, NEVER), marks_each)
  some = (marks > NEVER / 2).any(2)  # [W, 1 or n', slots]
  piece = jnp.arange(slots) // cut.piece + 1
  counts = jnp.where(some, piece, 0).max(2).astype(jnp.int32)
  counts = counts if lists > 1 else counts.max(1, keepdims=True)
  clean = some.all(1).reshape(items, rounds, -1).all(2)
  whole = lambda a: by_item(pad(a, rounds * per_block), lists_each)
  scalars = [counts.max(1), counts, clean, whole(work.start)]
  scalars += [whole(work.lead)] if pooled else []
  scalars = [
    jnp.broadcast_to(a, (items, lists_each)) if a is counts else a
    for a in scalars
  ]
  scalars = [a.reshape(-1).astype(jnp.int32) for a in scalars]
  marks = marks.reshape(items, -1, slots)
  heads, groups = cut.heads, k.shape[1]
  q = work.q.reshape(items, heads, rows, width)
  tensors = [q, marks]
  if work.k_scale is not None:  # of what nobody sees, it may be anything
    for scale in (work.k_scale, work.v_scale):
      scale = pad(scale, slots).reshape(items, heads, slots)
      tensors.append(jnp.where(some, scale, 0))

  def block(shape):
    index = lambda core, step, *_: (core * steps + step, *[0] * len(shape))
    return pl.BlockSpec((each, *shape), index)

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  depth, f32, wide = cut.depth, jnp.float32, v.shape[3]
  shapes = [(heads, rows, wide), (heads, rows, LANES)]
  shapes += [(heads, rows, slots)] if mass else []
  out, lse, *scores = pl.pallas_call(
    functools.partial(
      _kernel,
      rule=rule,
      plan=Plan(
        cut,
        rounds,
        splits,
        sharers=owners // groups,
        lists=lists_each,
        first_row=first_row,
        pooled=pooled,
        quantised=work.k_scale is not None,
        marked=work.marks.shape[2],
      ),
      each=each,
    ),
    out_shape=[
      result((items, *s), f32, *scalars, *tensors, k, v) for s in shapes
    ],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(cores, steps),
      in_specs=[block(a.shape[1:]) for a in tensors] + [anywhere] * 2,
      out_specs=[block(s) for s in shapes],
      scratch_shapes=[
        pltpu.VMEM((depth, heads, cut.slots, width), k.dtype),
        pltpu.VMEM((depth, heads, cut.slots, wide), v.dtype),
        pltpu.SemaphoreType.DMA((depth, 2)),
        pltpu.SMEM((4,), jnp.int32),
        pltpu.VMEM((heads, rows, LANES), f32),
        pltpu.VMEM((heads, rows, LANES), f32),
        pltpu.VMEM((heads, rows, wide), f32),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=cut.vmem_limit_bytes,
      disable_bounds_checks=not debug,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * items * heads * rows * slots * (width + wide),
      bytes_accessed=items * heads * slots * (width + wide) * k.dtype.itemsize,
      transcendentals=items * heads * rows * slots,
    ),
    interpret=interpret,
    name="sparse_decode_attention",
  )(*scalars, *tensors, k, v)
  lse = lse[..., 0]
  shape = (batch, owners)
  (scores,) = scores or [jnp.zeros((items, heads, 0), f32)]
  flat = lambda a: a.reshape(*shape, *a.shape[2:])
  return flat(out), flat(lse), flat(scores)


def _kernel(*refs, rule: Rule, plan: Plan, each: int):
  """A step: `each` items, one after the other.

  Scalars in SMEM: see `Stream`, and whether all slots of a block are seen,
  i32[W * rounds].
  In, of each item: q [n, R, D], marks [1 or R, or n times as many, X], and with
  quantised keys their scales and those of values [n, X]; k and v, in HBM.
  Out: out [n, R, E], lse [n, R, 128] and, if asked for, scores [n, R, X].
  Scratch: see `Stream`; top of the scores, sum of exp, sum of values.
  """
  most, counts, clean, start, *refs = refs
  lead, refs = (refs[0], refs[1:]) if plan.pooled else (None, refs)
  q_ref, marks_ref, *refs = refs
  scales, refs = refs[: 2 * plan.quantised], refs[2 * plan.quantised :]
  k_hbm, v_hbm, out_ref, lse_ref, *scores, k_ref, v_ref = refs[:-5]
  sems, state, top_ref, sum_ref, total_ref = refs[-5:]
  core, step = pl.program_id(0), pl.program_id(1)
  steps, cut = pl.num_programs(1), plan.cut
  first = (core * steps + step) * each
  end = (core + 1) * steps * each
  stream = Stream(
    plan, most, counts, start, lead, (k_hbm, v_hbm), (k_ref, v_ref), sems,
    state, end,
  )  # fmt: skip
  pl.when(step == 0)(lambda: stream.begin(first))
  precise = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
  dot = functools.partial(
    lax.dot_general, precision=precise, preferred_element_type=jnp.float32
  )
  scale = q_ref.shape[3] ** -0.5 if rule.scale is None else rule.scale

  @pl.loop(0, each)
  def _(n):
    item = first + n
    top_ref[...] = jnp.full(top_ref.shape, NEVER / 2)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    for ref in scores:
      ref[n] = jnp.full(ref.shape[1:], NEVER)
    rounds = lax.div(most[item] + plan.pieces - 1, plan.pieces)

    @pl.loop(0, jnp.maximum(rounds, 1))
    def _(block):
      stream.issue()
      slot = stream.wait(item, block)
      here = pl.ds(pl.multiple_of(block * cut.slots, cut.slots), cut.slots)
      row = lambda h: pl.ds(h * plan.marked % marks_ref.shape[1], plan.marked)
      of_head = lambda h: marks_ref[n, row(h), here]
      if not plan.quantised:

        @pl.when(clean[item * plan.rounds + block] == 0)
        def _():  # a weight of 0 does not undo what may be NaN
          for h in range(cut.heads):
            top = of_head(h).max(0, keepdims=True)
            seen = jnp.broadcast_to(top, (v_ref.shape[3], cut.slots)).T
            v = v_ref[slot, h]
            v_ref[slot, h] = jnp.where(seen > NEVER / 2, v, jnp.zeros_like(v))

      def load(ref, h):
        return (
          ref[slot, h].astype(q_ref.dtype) if plan.quantised else ref[slot, h]
        )

      # Phase by phase, so that heads fill one another's latencies.
      heads = range(cut.heads)
      scored = [
        dot(q_ref[n, h], load(k_ref, h), (((1,), (1,)), ((), ())))
        for h in heads
      ]
      weights, fades = [], []
      for h, s in zip(heads, scored):
        s = s * scale
        if plan.quantised:
          s = s * scales[0][n, pl.ds(h, 1), here]
        if rule.softcap is not None:
          s = rule.softcap * jnp.tanh(s / rule.softcap)
        marks = of_head(h)
        s = jnp.where(marks > NEVER / 2, s + marks, NEVER)
        for ref in scores:
          ref[n, h, :, here] = s
        old = top_ref[h][:, :1]
        top = jnp.maximum(old, s.max(1, keepdims=True))
        p, fade = jnp.exp(s - top), jnp.exp(old - top)
        total = sum_ref[h][:, :1] * fade + p.sum(1, keepdims=True)
        if plan.quantised:
          p = p * scales[1][n, pl.ds(h, 1), here]
        weights.append(
          p.astype(v_ref.dtype if not plan.quantised else q_ref.dtype)
        )
        fades.append(fade)
        top_ref[h] = jnp.broadcast_to(top, top_ref.shape[1:])
        sum_ref[h] = jnp.broadcast_to(total, sum_ref.shape[1:])
      for h, p, fade in zip(heads, weights, fades):
        values = dot(p, load(v_ref, h), (((1,), (0,)), ((), ())))
        total_ref[h] = total_ref[h] * fade + values

    for h in range(cut.heads):
      total = sum_ref[h]
      safe = jnp.where(total == 0, 1.0, total)
      out_ref[n, h] = total_ref[h] / safe[:, :1]
      lse = top_ref[h] + jnp.log(safe)
      lse_ref[n, h] = jnp.where(total == 0, -jnp.inf, lse)
