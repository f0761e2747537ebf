# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on Hopper GPUs, forward: a thread block.

It has one or two warp groups that multiply, each 64 queries, and one that only
loads.  The latter follows the list: it copies (TMA) key blocks, their values
and marks into a ring of slots, ahead of the others, which keep scores, weights
and sums in registers (wgmma) and do an online softmax.  Blocks that every query
of a tile sees come first, in a loop without masks; what no query of it sees is
not loaded.

Where it is interpreted the weights pass through shared memory and the sums are
added afterwards, for the interpreter has no product of registers, nor one that
adds to them.

Axes: as in `types`.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention import gpu_plan
from pallas_kernels.block_sparse_attention.gpu_plan import PIECE
from pallas_kernels.block_sparse_attention.plan import FLOOR, LOG2E
from pallas_kernels.block_sparse_attention.types import Rule

LAYOUT = plgpu.Layout.WGMMA
OF_QUERIES, OF_KEYS = LAYOUT.reduce(1), LAYOUT.reduce(0)
# Each lane of the three warp groups shares 512 registers: 2 x 232 + 40.
MULTIPLY_REGISTERS, LOAD_REGISTERS = 232, 40


def attend(refs: SimpleNamespace, sizes: gpu_plan.Sizes, rule: Rule) -> None:
  """One thread block: the loading warp group, and those that multiply."""
  place = sizes.place(lax.axis_index("item"))
  warp_group = lax.axis_index("wg")
  row = *sizes.owner(place, refs.total), place.tile
  total = refs.total[row]

  @pl.when(warp_group == sizes.multipliers)
  def loading():
    if sizes.multipliers > 1:
      plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")
    _load(refs, sizes, place, row, total)

  @pl.when(warp_group < sizes.multipliers)
  def multiplying():
    if sizes.multipliers > 1:
      plgpu.set_max_registers(MULTIPLY_REGISTERS, action="increase")
    piece = _Piece(refs, sizes, rule, place, row, warp_group)
    piece.attend(refs.unmasked[row], total)


def _load(
  refs: SimpleNamespace,
  sizes: gpu_plan.Sizes,
  place: gpu_plan.Place,
  row: tuple[Any, ...],
  total: jax.Array,
) -> None:
  """Follows the list of a row, and fills the ring."""
  stages, size = sizes.stages, sizes.cut.block_kv
  capacity = sizes.cut.lists[3]
  owner = sizes.owner(place, refs.k)

  def step(n, block):
    following = refs.block[*row, jnp.minimum(n + 1, capacity - 1)]
    slot = lax.rem(n, stages)
    keys = pl.ds(block * size, size)
    full = refs.k_full.at[slot]

    @pl.when(n >= stages)
    def used_up():
      plgpu.barrier_wait(refs.k_free.at[slot])

    plgpu.copy_gmem_to_smem(refs.k.at[*owner, keys], refs.k_ring.at[slot], full)
    for name, ring in refs.mark_rings.items():
      mark = getattr(refs, f"key_{name}")
      there = mark.at[*sizes.owner(place, mark), block]
      plgpu.copy_gmem_to_smem(there, ring.at[slot], full)

    @pl.when(n >= stages)
    def used():
      plgpu.barrier_wait(refs.v_free.at[slot])

    plgpu.copy_gmem_to_smem(
      refs.v.at[*owner, keys], refs.v_ring.at[slot], refs.v_full.at[slot]
    )
    return following

  lax.fori_loop(0, total, step, refs.block[*row, 0])

  @pl.loop(jnp.maximum(total - stages, 0), total)
  def all_used(n):
    plgpu.barrier_wait(refs.k_free.at[lax.rem(n, stages)])
    plgpu.barrier_wait(refs.v_free.at[lax.rem(n, stages)])


@dataclasses.dataclass(frozen=True)
class _Piece:
  """The queries of a warp group, and their online softmax."""

  refs: SimpleNamespace
  sizes: gpu_plan.Sizes
  rule: Rule
  place: gpu_plan.Place
  row: tuple[Any, ...]
  warp_group: Any

  def attend(self, unmasked: jax.Array, total: jax.Array) -> None:
    """Attends to all entries of the row and stores what comes out."""
    refs, queries = self.refs, self.sizes.cut.shape[3]
    head, first = self.sizes.piece(self.place, self.warp_group)
    q = refs.q_shared.at[self.warp_group]
    full = refs.q_full.at[self.warp_group]
    # A piece past the last query reads the last one there is.
    safe = jnp.minimum(first, (queries - 1) // PIECE * PIECE)
    there = pl.ds(safe, PIECE)
    plgpu.copy_gmem_to_smem(refs.q.at[self.place.batch, head, there], q, full)
    state = self.begin(head)
    marks = self.query_marks(first)
    plgpu.barrier_wait(full)
    for low, high, masked in (0, unmasked, False), (unmasked, total, True):

      def step(n, state, masked=masked):
        return self.step(n, state, first, marks if masked else None)

      state = lax.fori_loop(low, high, step, state)
    self.end(state, head, first)

  def begin(self, head: jax.Array) -> tuple[jax.Array, ...]:
    """Nothing seen yet but the sink: maximum, total f32[64]; sums [64, E]."""
    column = lambda x: plgpu.layout_cast(
      jnp.full((PIECE,), x, jnp.float32), OF_QUERIES
    )
    value_width = self.sizes.cut.shape[-1]
    sums = jnp.zeros((PIECE, value_width), jnp.float32)
    sums = plgpu.layout_cast(sums, LAYOUT)
    if not hasattr(self.refs, "sinks"):
      return column(FLOOR), column(0.0), sums
    sink = column(self.refs.sinks[head])
    top = jnp.maximum(sink, FLOOR)
    return top, jnp.exp2(sink - top), sums

  def query_marks(self, first: jax.Array) -> list[jax.Array]:
    """Last position seen, that before the first, and segment, i32[64]."""
    marks = self.refs.queries
    batch = self.place.batch if marks.shape[0] > 1 else 0
    here = pl.ds(first, PIECE)
    return [_read(marks.at[batch, n, here], OF_QUERIES) for n in range(3)]

  def step(
    self,
    n: jax.Array,
    state: tuple[jax.Array, ...],
    first: jax.Array,
    marks: list[jax.Array] | None,
  ) -> tuple[jax.Array, ...]:
    """Adds entry `n`; without marks, all pairs are visible."""
    refs, size = self.refs, self.sizes.cut.block_kv
    top, total, sums = state
    slot = lax.rem(n, self.sizes.stages)
    plgpu.barrier_wait(refs.k_full.at[slot])

    def multiply(acc):
      k = refs.k_ring.at[slot]
      plgpu.wgmma(acc, refs.q_shared.at[self.warp_group], k.transpose((1, 0)))
      return acc[...]

    s = pl.run_scoped(multiply, plgpu.ACC((PIECE, size)))
    s, factor = self.scores(s, n, slot, first, marks)
    if refs.mark_rings:
      plgpu.commit_smem()  # they are read before others take their place
    plgpu.barrier_arrive(refs.k_free.at[slot])
    high = jnp.maximum(top, s.max(axis=1) * factor)
    shrink = jnp.exp2(top - high)
    p = jnp.exp2(s * factor - _across(high, size))
    total = total * shrink + p.sum(axis=1)
    p = p.astype(refs.q_shared.dtype)
    plgpu.barrier_wait(refs.v_full.at[slot])

    sums = self.add(sums * _across(shrink, sums.shape[1]), p, slot)
    plgpu.barrier_arrive(refs.v_free.at[slot])
    return high, total, sums

  def add(self, sums: jax.Array, p: jax.Array, slot: jax.Array) -> Any:
    """Sums, [64, E], and the values in a slot, weighed by p, [64, block]."""
    v = self.refs.v_ring.at[slot]
    if not hasattr(self.refs, "weights"):
      multiply = lambda acc: plgpu.wgmma(acc, p, v)
      return pl.run_state(multiply)(plgpu.ACC.init(sums))
    weights = self.refs.weights.at[self.warp_group]
    weights[...] = p

    def interpreted(acc):
      plgpu.wgmma(acc, weights, v)
      return acc[...]

    acc = plgpu.ACC((PIECE, sums.shape[1]))
    return sums + pl.run_scoped(interpreted, acc)

  def scores(
    self,
    s: jax.Array,
    n: jax.Array,
    slot: jax.Array,
    first: jax.Array,
    marks: list[jax.Array] | None,
  ) -> tuple[jax.Array, float]:
    """Scores, [64, block], and what makes powers of two of them."""
    rule, width = self.rule, self.sizes.cut.shape[5]
    factor = width**-0.5 if rule.scale is None else rule.scale
    if rule.softcap is None:
      factor *= LOG2E
    else:  # tanh x = 1 - 2 / (exp(2 x) + 1)
      grown = jnp.exp2(s * (2 * LOG2E * factor / rule.softcap))
      s = rule.softcap * LOG2E - 2 * rule.softcap * LOG2E / (grown + 1)
      factor = 1.0
    if "bias" in self.refs.mark_rings:
      s = s * factor + self.key_mark("bias", slot)
      factor = 1.0
    if marks is not None:
      for seen in self.seen(n, slot, first, marks):
        s = jnp.where(seen, s, -jnp.inf)
    return s, factor

  def seen(self, n: Any, slot: Any, first: Any, marks: list[jax.Array]):
    """Which pairs each of the conditions lets through, bool[64, block]."""
    cut, refs = self.sizes.cut, self.refs
    size = cut.block_kv
    top, low, segment = marks
    if hasattr(refs, "bits"):
      at = self.row[0], self.row[1], self.row[2], n >> 5
      place = first - self.place.tile * cut.block_q
      word = _read(refs.bits.at[*at, pl.ds(place, PIECE)], OF_QUERIES)
      top = jnp.where(((word >> (n & 31)) & 1) == 1, top, -1)
    if "pos" in refs.mark_rings:
      pos = self.key_mark("pos", slot)
    else:  # what fills the last block is no key
      top = jnp.minimum(top, cut.shape[4] - 1)
      pos = plgpu.broadcasted_iota(jnp.int32, (PIECE, size), 1, layout=LAYOUT)
      pos += refs.block[*self.row, n] * size
    yield pos <= _across(top, size)
    if self.rule.window is not None:
      yield pos > _across(low, size)
    if "segment" in refs.mark_rings:
      yield self.key_mark("segment", slot) == _across(segment, size)

  def key_mark(self, name: str, slot: jax.Array) -> jax.Array:
    """A mark of the keys in a slot, for each query, [64, block]."""
    mark = self.refs.mark_rings[name].at[slot]
    mark = _read(mark, OF_KEYS)
    return lax.broadcast_in_dim(mark, (PIECE, mark.shape[0]), (1,))

  def end(
    self, state: tuple[jax.Array, ...], head: jax.Array, first: jax.Array
  ) -> None:
    """Divides by the totals, and stores."""
    refs, batch = self.refs, self.place.batch
    top, total, sums = state
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, top / LOG2E + jnp.log(safe))
    out = sums * _across(1 / safe, sums.shape[1])
    shared = refs.out_shared if hasattr(refs, "out_shared") else refs.q_shared
    shared = shared.at[self.warp_group]
    shared[...] = out.astype(shared.dtype)
    lse_shared = refs.lse_shared.at[self.warp_group]
    lse_shared[...] = lse
    plgpu.commit_smem()
    there = pl.ds(first, PIECE)
    plgpu.copy_smem_to_gmem(lse_shared, refs.lse.at[batch, head, there])

    @pl.when(first < self.sizes.cut.shape[3])
    def store():
      plgpu.copy_smem_to_gmem(shared, refs.out.at[batch, head, there])

    plgpu.wait_smem_to_gmem(0)


def _read(ref: Any, layout: Any) -> jax.Array:
  """Marks, brought into a layout."""
  load: Any = plgpu.load  # jax 0.10 has another signature
  return load(ref, layout=layout, optimized=False)


def _across(x: jax.Array, width: int) -> jax.Array:
  """What is known of each query, for each key or column."""
  return lax.broadcast_in_dim(x, (*x.shape, width), (0,))
