# SPDX-License-Identifier: Apache-2.0
"""Rows of an unsorted x, picked inside of a kernel.

Axes: M places, T rows of x, K features; tm height of a tile.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.ring import Scalar
from pallas_kernels.grouped_matmul.tuned import LANES


@dataclasses.dataclass(frozen=True)
class Picker:
  """All rows of x in VMEM, and the rows of a tile, in two halves.

  The halves are picked in turns: while one is multiplied, the other one is
  filled.  Their addresses are static, so the compiler sees that they differ.

  All is kept as 32-bit words, since a row of bf16 is half of each word of a
  pair of rows; and a row of K words is contiguous, so that with K a multiple of
  1024 it is whole registers.
  """

  index: Any  # i32[M] in SMEM: the row of x in each place
  hbm: Any  # x, [T, K]
  picked: Any  # u32[tm, K], or u32[tm / 2, K] of pairs of bf16
  kept: Any  # f32[T K / 128, 128]
  slabs: Any  # [2, slab, K]: rows of x on their way
  sems: Any  # [2]

  @property
  def spans(self) -> int:
    """Spans of 128 features in a row."""
    return self.picked.shape[1] // LANES

  @property
  def pack(self) -> int:
    """Values in a word."""
    return 4 // self.slabs.dtype.itemsize

  def copy(self, n: Scalar) -> Any:
    """The transfer of slab n."""
    size = self.slabs.shape[1]
    at = pl.ds(pl.multiple_of(n * size, size), size)
    slot = lax.rem(n, 2)
    return pltpu.make_async_copy(
      self.hbm.at[at, :], self.slabs.at[slot], self.sems.at[slot]
    )

  def keep(self) -> None:
    """Reads all of x."""
    size, spans = self.slabs.shape[1], self.spans
    count = self.hbm.shape[0] // size
    self.copy(0).start()

    @pl.loop(0, count)
    def _(n):
      pl.when(n + 1 < count)(lambda: self.copy(n + 1).start())
      self.copy(n).wait()
      words = size * spans
      here = self.kept.at[pl.ds(pl.multiple_of(n * words, words), words), :]
      slab = self.slabs.at[lax.rem(n, 2)]
      for k in range(spans):
        span = slab[:, pl.ds(k * LANES, LANES)]
        here[pl.ds(k, size, stride=spans), :] = span.astype(here.dtype)

  def row(self, place: Scalar) -> jax.Array:
    """The words of the row of x in a place, u32[K / 128, 128]."""
    start = pl.multiple_of(self.index[place] * self.spans, self.spans)
    return pltpu.bitcast(self.kept[pl.ds(start, self.spans), :], jnp.uint32)

  def pick(self, tile: Scalar, half: int, *, unroll: bool = False) -> None:
    """Fills a half, 0 or 1, with rows of a tile.

    Unrolled, it fits into the block of the schedule around it.
    """
    words, features = self.picked.shape
    words //= 2
    step = words if unroll else math.gcd(words, 8)

    def put(n):
      place = ((2 * tile + half) * words + n) * self.pack
      word = self.row(place)
      if self.pack == 2:  # the upper half of an f32 is its bf16
        low = lax.shift_right_logical(word, jnp.uint32(16))
        word = low | (self.row(place + 1) & jnp.uint32(0xFFFF0000))
      self.picked[pl.ds(half * words + n, 1), :] = word.reshape(1, features)

    def puts(n):
      for k in range(step):
        put(n * step + k)

    if step == words:
      puts(0)
    else:
      pl.loop(0, words // step)(puts)

  def load(self, at: Scalar, size: int) -> jax.Array:
    """Rows `at .. at + size - 1` of the tile, [size, K]."""
    start = at // self.pack if isinstance(at, int) else lax.div(at, self.pack)
    size //= self.pack
    if not isinstance(start, int):
      start = pl.multiple_of(start, size)
    words = self.picked[pl.ds(start, size), :]
    return pltpu.bitcast(words, self.slabs.dtype)
