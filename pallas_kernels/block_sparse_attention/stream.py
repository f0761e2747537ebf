# SPDX-License-Identifier: Apache-2.0
"""The keys of the steps to come, on their way into VMEM.

A *step* looks at `merge` key blocks for a tile of queries; a row without
entries has one, which does nothing.  Steps are in the order of the grid, and
loads run ahead of them over the borders of tiles and heads.

Axes: as in `cuts`; W keys of a step.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention.cuts import Cut
from pallas_kernels.block_sparse_attention.plan import MARKS

Scalar = Any
"""i32[] as an array, or an int where it is static."""
CURSOR = 6
"""Numbers of the cursor: batch, head, tile and step; loads begun, and ended."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the lists, in scalar memory."""

  words: Any
  at: Scalar  # its header
  cut: Cut

  @property
  def unmasked(self) -> Scalar:
    """Entries of which every pair is visible."""
    return self.words[self.at] & 0xFFFF

  @property
  def total(self) -> Scalar:
    return lax.shift_right_logical(self.words[self.at], 16)

  @property
  def steps(self) -> Scalar:
    shift = self.cut.merge.bit_length() - 1
    return (self.total + self.cut.merge - 1) >> shift

  @property
  def unmasked_steps(self) -> Scalar:
    return self.unmasked >> (self.cut.merge.bit_length() - 1)

  def block(self, step: Scalar, n: int) -> Scalar:
    """Entry `n` of a step."""
    if self.cut.merge > 1:
      word = self.words[self.at + 1 + step * (self.cut.merge // 2) + n // 2]
      return (word >> 16 * (n % 2)) & 0xFFFF
    word = self.words[self.at + 1 + (step >> 1)]
    return (word >> ((step & 1) * 16)) & 0xFFFF


@dataclasses.dataclass(frozen=True)
class Stream:
  """Loads keys, values and marks, `cut.depth` steps deep."""

  cut: Cut
  words: Any  # of `plan.Rows`, flat, in SMEM
  start: Any  # i32[2], batch and work head where the part begins, in SMEM
  hbm: tuple[Any, ...]  # k, [B, G, S, D]; v, [B, G, S, E]; their marks
  vmem: tuple[
    Any, ...
  ]  # [depth, W, D]; [depth, W, E]; [depth, merge, 8, block]
  sems: Any  # [len(vmem), depth]
  cursor: Any  # i32[CURSOR] in SMEM
  core: Scalar

  def row(self, b: Scalar, m: Scalar, t: Scalar) -> Row:
    """Of a place in the core."""
    b, m, t = self.cut.place(self.core, b, m, t)
    batch, heads, tiles = self.cut.part_rows
    if batch == 1:
      b = 0
    if self.cut.per_list > 1:
      m = lax.div(m, self.cut.per_list)
    row = (b * heads + m) * tiles + t
    return Row(self.words, row * self.cut.words, self.cut)

  def open(self) -> None:
    """Begins the first loads."""
    for n in range(CURSOR):
      self.cursor[n] = 0
    pl.loop(0, self.cut.depth - 1)(lambda _: self.advance())

  def advance(self) -> None:
    """Begins the load of one more step, if there is one."""
    batch, heads, tiles = self.cut.extent
    b, m, t, step, begun = (self.cursor[n] for n in range(5))
    inside = b < batch
    row = self.row(jnp.minimum(b, batch - 1), m, t)

    @pl.when(inside & (row.total > 0))
    def _():
      self.begin(row, step, b, m, t, begun & (self.cut.depth - 1))

    step = step + 1
    ends = step >= row.steps
    t = t + ends.astype(jnp.int32)
    wraps = t == tiles
    m = m + wraps.astype(jnp.int32)
    turns = m == heads
    self.cursor[0] = b + turns.astype(jnp.int32)
    self.cursor[1] = jnp.where(turns, 0, m)
    self.cursor[2] = jnp.where(wraps, 0, t)
    self.cursor[3] = jnp.where(ends, 0, step)
    self.cursor[4] = begun + 1

  def begin(self, row, step, b, m, t, slot) -> None:
    """Begins the loads of a step."""
    b, m, _ = self.cut.place(self.core, b, m, t)
    b, m = b + self.start[0], m + self.start[1]
    g = m
    if self.cut.per_key_head > 1:
      g = lax.div(m, self.cut.per_key_head)
    size = self.cut.block_kv
    for n in range(self.cut.merge):
      block = row.block(step, n)
      at = pl.ds(pl.multiple_of(block * size, size), size)
      to = pl.ds(n * size, size)
      copies = [
        (hbm.at[b, g, at], vmem.at[slot, to])
        for hbm, vmem in zip(self.hbm[:2], self.vmem[:2])
      ]
      for hbm, vmem in zip(self.hbm[2:], self.vmem[2:]):
        place = (0 if hbm.shape[0] == 1 else b, 0 if hbm.shape[1] == 1 else g)
        copies.append((hbm.at[*place, block], vmem.at[slot, n]))
      for kind, (source, target) in enumerate(copies):
        sem = self.sems.at[kind, slot]
        pltpu.make_async_copy(source, target, sem).start()

  def take(self) -> Scalar:
    """Waits for the load of the next step: its slot."""
    slot = self.cursor[5] & (self.cut.depth - 1)
    self.skip()
    for n, vmem in enumerate(self.vmem):
      here = vmem.at[slot]  # as many bytes as its loads have in all
      pltpu.make_async_copy(here, here, self.sems.at[n, slot]).wait()
    return slot

  def skip(self) -> None:
    """Goes on to the next step."""
    self.cursor[5] = self.cursor[5] + 1


def scratch(cut: Cut, dtype: Any, marked: bool) -> dict[str, Any]:
  """Of a `Stream`: its buffers, semaphores and cursor."""
  *_, width, value_width = cut.shape
  buffers = {
    "k_vmem": pltpu.VMEM((cut.depth, cut.keys, width), dtype),
    "v_vmem": pltpu.VMEM((cut.depth, cut.keys, value_width), dtype),
  }
  if marked:
    shape = (cut.depth, cut.merge, MARKS, cut.block_kv)
    buffers["marks_vmem"] = pltpu.VMEM(shape, jnp.int32)
  return buffers | {
    "sems": pltpu.SemaphoreType.DMA((len(buffers), cut.depth)),
    "cursor": pltpu.SMEM((CURSOR,), jnp.int32),
  }
