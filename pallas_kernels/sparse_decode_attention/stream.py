# SPDX-License-Identifier: Apache-2.0
"""The transfers of sparse decode attention on TPU, and their order.

Axes: W work items (rows of the batch and lists), n key heads of an item, C
slots of a block, D head width.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_decode_attention.tuned import Blocks

UNROLLED = 16
"""Transfers that are started without a branch in between."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the kernel knows of its work beforehand.

  Attributes:
    cut: see `Blocks`.
    rounds: blocks of the longest list.
    splits: items of a row of the batch.
    sharers: heads of items that share a key head.
    lists: of an item: 1, or one for each of its heads.
    first_row: of the batch.
    pooled: pages lie in a pool.
    quantised: keys and values have scales.
    marked: rows of marks of a head: 1, or one for each of its queries.
  """

  cut: Blocks
  rounds: int
  splits: int
  sharers: int
  lists: int
  first_row: int
  pooled: bool
  quantised: bool
  marked: int

  @property
  def pieces(self) -> int:
    """Of a block."""
    return self.cut.slots // self.cut.piece


@dataclasses.dataclass(frozen=True)
class Stream:
  """Blocks on their way from HBM, in the order in which they are attended.

  Loads are in turn in the buffers.  `state` is the item and the block to load
  next, and how many blocks were started and attended.
  """

  plan: Plan
  most: Any  # i32[W] in SMEM: pieces of an item's longest list
  counts: Any  # i32[W * lists]: pieces of each
  start: Any  # i32[W * lists * rounds * pieces]
  lead: Any  # the same; None where it is the row of the batch
  hbm: Any  # (k, v)
  vmem: Any  # (k, v), [depth, n, C, D]
  sems: Any  # [depth, 2]
  state: Any  # i32[4] in SMEM
  end: Any  # the first item that is not ours

  def begin(self, item: Any) -> None:
    """Starts the first loads."""
    for n, value in enumerate((item, 0, 0, 0)):
      self.state[n] = value
    pl.loop(0, self.plan.cut.depth - 1)(lambda _: self.issue())

  def pieces(self, of: Any, block: Any) -> Any:
    """Pieces to load of a block of a list."""
    most = self.plan.pieces
    return jnp.clip(self.counts[of] - block * most, 0, most)

  def heads(self, n: Any) -> tuple[Any, int]:
    """Those of an item that list n of it is for: the first, how many."""
    each = self.plan.cut.heads // self.plan.lists
    return n * each, each

  def issue(self) -> None:
    """Starts to load the next block, if there is one."""
    item, block = self.state[0], self.state[1]

    @pl.when(item < self.end)
    def _():
      slot = lax.rem(self.state[2], self.plan.cut.depth)
      pl.loop(0, self.plan.lists)(lambda n: self.load(item, block, slot, n))
      more = (block + 1) * self.plan.pieces < self.most[item]
      self.state[0] = jnp.where(more, item, item + 1)
      self.state[1] = jnp.where(more, block + 1, 0)
      self.state[2] += 1

  def load(self, item: Any, block: Any, slot: Any, n: Any) -> None:
    """Starts the transfers of a block of list n of an item."""
    plan, size = self.plan, self.plan.cut.piece
    of = item * plan.lists + n
    first = (of * plan.rounds + block) * plan.pieces
    head, heads = self.heads(n)
    owner = lax.rem(item, plan.splits) * plan.cut.heads + head
    here, there = pl.ds(head, heads), pl.ds(lax.div(owner, plan.sharers), heads)
    count = self.pieces(of, block)
    row = plan.first_row + lax.div(item, plan.splits)

    def start(m):
      lead = self.lead[first + m] if plan.pooled else row
      begin = self.start[first + m]
      source = pl.ds(pl.multiple_of(begin, size), size)
      target = pl.ds(pl.multiple_of(m * size, size), size)
      for a, (hbm, vmem) in enumerate(zip(self.hbm, self.vmem)):
        pltpu.make_async_copy(
          hbm.at[lead, there, source, :],
          vmem.at[slot, here, target, :],
          self.sems.at[slot, a],
        ).start()

    many = min(UNROLLED, plan.pieces)
    rounds = lax.div(count, many)

    @pl.loop(0, rounds)
    def _(m):
      for k in range(many):
        start(m * many + k)

    pl.loop(rounds * many, count)(start)

  def wait(self, item: Any, block: Any) -> Any:
    """Waits for the next block; the buffer it is in."""
    slot = lax.rem(self.state[3], self.plan.cut.depth)
    self.state[3] += 1

    def arrived(heads, size):
      for a, vmem in enumerate(self.vmem):
        place = vmem.at[slot, heads, pl.ds(0, size), :]
        pltpu.make_async_copy(place, place, self.sems.at[slot, a]).wait()

    @pl.loop(0, self.plan.lists)
    def _(n):
      here = pl.ds(*self.heads(n))
      count = self.pieces(item * self.plan.lists + n, block)
      whole = count == self.plan.pieces
      pl.when(whole)(functools.partial(arrived, here, self.plan.cut.slots))

      @pl.loop(0, jnp.where(whole, 0, count))
      def _(_):
        arrived(here, self.plan.cut.piece)

    return slot
