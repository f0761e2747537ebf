# SPDX-License-Identifier: Apache-2.0
"""The chunks of a cover: gather, compute, scatter back.

Axes: N items, C rows of one chunk.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from adaptivejax.core.covers import Cover
from adaptivejax.core.marks import marked
from adaptivejax.core.select import compact
from adaptivejax.core.varying import vary, varying_axes

Leaves = list[Any]


class Chunk(NamedTuple):
  """`size` slots of the compacted rows; slot s holds row `order[s]`."""

  size: int
  begin: Int[Array, ""]
  order: Int[Array, " N"]
  live: Bool[Array, " C"]
  mask: Bool[Array, " N"]

  @property
  def whole(self) -> bool:
    """A chunk of all rows runs on x itself: no gather, no scatter."""
    return self.size == self.mask.shape[0]

  @property
  def items(self) -> Int[Array, " C"]:
    """The row of each slot; padding is a selected row."""
    return lax.dynamic_slice_in_dim(self.order, self.begin, self.size)

  def gather(self, x: Leaves) -> Leaves:
    """The rows of this chunk; padding repeats a selected row."""
    if self.whole:
      return [fill(a, self.mask, self.order) for a in x]
    return [a.at[self.items].get(mode="promise_in_bounds") for a in x]

  def gather_live(self, x: Leaves) -> Leaves:
    """The rows of this chunk; padding is zero."""
    return [where(self.live, a, jnp.zeros_like(a)) for a in self.gather(x)]

  def scatter(self, y: Leaves, rows: Leaves) -> Leaves:
    """Writes the live rows of this chunk into `y`."""
    if self.whole:
      return [where(self.mask, new, old) for new, old in zip(rows, y)]
    n = self.mask.shape[0]
    nowhere = n + jnp.arange(self.size, dtype=jnp.int32)
    to = jnp.where(self.live, self.items, nowhere)
    write = lambda old, new: old.at[to].set(
      vary(new, varying_axes(old)), mode="drop", unique_indices=True
    )
    return [write(old, new) for old, new in zip(y, rows)]


def run_cover(
  cover: Cover, mask, step: Callable, state: Any
) -> tuple[Any, Array]:
  """Runs `step(chunk, state)` over the cover; returns the state and slots."""
  order, count = compact(mask)
  n, done = mask.shape[0], jnp.zeros_like(count)
  for size, rounds in zip(cover.sizes, cover.trips(count), strict=True):

    def body(i, state, size=size, done=done):
      first = done + i * size
      begin = jnp.minimum(first, n - size)  # the last chunk may overlap
      slot = begin + jnp.arange(size, dtype=jnp.int32)
      live = mask if size == n else (slot >= first) & (slot < count)
      return step(Chunk(size, begin, order, live, mask), state)

    # The conditional: XLA hoists the invariant part of a body out of its loop,
    # and would run it even where the loop has no rounds.
    with each_once(cover, size, n):
      state = lax.cond(
        rounds > 0,
        lambda s, rounds=rounds, body=body: lax.fori_loop(0, rounds, body, s),
        lambda s: s,
        state,
      )
    done += rounds * size
  return state, done.astype(jnp.float32)


def each_once(
  cover: Cover, size: int, rows: int
) -> contextlib.AbstractContextManager:
  """Marks the loop over the chunks of one size (`core.marks`): the rows, all
  of them for the largest size of a cover.
  """
  return marked(rows=rows if size == max(cover.sizes) else 0, of=size)


def fill(a: Array, mask: Bool[Array, " N"], order: Int[Array, " N"]) -> Array:
  """`a` with a selected row in place of the unselected (ones if none is)."""
  live = jnp.where(mask.any(), a[order[-1]], jnp.ones_like(a[0]))
  return where(mask, a, lax.stop_gradient(live)[None])


def where(mask: Bool[Array, " N"], a: Array, b: Array) -> Array:
  """Row by row, `a` where the mask holds and else `b`."""
  return jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)
