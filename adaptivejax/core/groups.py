# SPDX-License-Identifier: Apache-2.0
"""Slots in groups, covered by chunks of one group each.

`core.chunks` covers one selection; here every group has a count of its own.
All chunks of one size run in one loop, whichever group they are of, so that few
bodies compile and a group without slots costs nothing.

Axes: M slots, G groups, C slots of one chunk, R chunk sizes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from adaptivejax.core.chunks import each_once
from adaptivejax.core.covers import Cover


class GroupChunk(NamedTuple):
  """C slots from `begin` on; only the live ones are the group's own."""

  group: Int[Array, ""]
  begin: Int[Array, ""]
  live: Bool[Array, " C"]

  def take(self, a: Array) -> Array:
    """The entries of these slots; padding repeats the group's last."""
    place = jnp.minimum(jnp.arange(self.live.size), self.live.sum() - 1)
    return a.at[self.begin + place].get(mode="promise_in_bounds")

  def put(self, a: Array, entries: Array) -> Array:
    """`a` with the entries of the live slots written, as far as it goes."""
    place = self.begin + jnp.arange(self.live.size)
    to = jnp.where(self.live, place, a.shape[0] + place)
    return a.at[to].set(entries, mode="drop", unique_indices=True)

  def of_group(self, a: Array) -> Array:
    """The group's own part of an array with leading axis G."""
    return lax.dynamic_index_in_dim(a, self.group, keepdims=False)


def run_groups(
  cover: Cover,
  sizes: Int[Array, " G"],
  step: Callable[[GroupChunk, Any], Any],
  state: Any,
  *,
  rows: int,
) -> tuple[Any, Array]:
  """Runs `step(chunk, state)` over the chunks of all groups.

  Args:
    cover: chunk sizes, and how many of each a count needs.
    sizes: slots of each group, which follow one another.
    step: what to do with a chunk.
    state: of the loop.
    rows: M, slots of all groups at most (static).

  Returns:
    The state, and the slots that were executed, f32[].
  """
  first = jnp.cumsum(sizes) - sizes
  trips = jax.vmap(cover.trips)(sizes)  # [G, R]
  done, slots = jnp.zeros_like(sizes), jnp.zeros((), jnp.float32)
  for size, rounds in zip(cover.sizes, trips.T, strict=True):
    ends = jnp.cumsum(rounds)

    def body(i, state, size=size, rounds=rounds, ends=ends, done=done):
      group = (ends <= i).sum(dtype=jnp.int32)
      before = done[group] + (i - ends[group] + rounds[group]) * size
      live = jnp.arange(size) < sizes[group] - before
      return step(GroupChunk(group, first[group] + before, live), state)

    with each_once(cover, size, rows):
      state = lax.cond(  # see `run_cover`
        ends[-1] > 0,
        lambda s, n=ends[-1], body=body: lax.fori_loop(0, n, body, s),
        lambda s: s,
        state,
      )
    done += rounds * size
    slots += (ends[-1] * size).astype(jnp.float32)
  return state, slots
