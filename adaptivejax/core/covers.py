# SPDX-License-Identifier: Apache-2.0
"""Covers: a data-dependent `count` of N rows by chunks of static size.

A cover names the few chunk sizes that are compiled and says how often each
runs for a given count; the chunks follow one another over the compacted rows.

* `ladder`: one chunk, the smallest rung that holds `count`; should none do,
  the top rung as often as needed.
* `tiles`: `ceil(count / tile)` equal chunks; one body to compile.
* `coins`: falling sizes, each as often as it fits, like paying with coins.
* `cheapest`: the combination of sizes that costs least, by a table.

The rule (`default_cover`): coins of N/4, N/10, N/20 and N/80 rows, in whole
multiples of 8, below one of min(N, 512).  A chunk has a fixed price, reading
the weights: it is paid off at 512 rows, so no chunk is larger, and it makes
many small chunks dear, so the sizes are the shares people choose as budgets (5,
10, 25 %) and a coin is paid out as soon as it is nearly filled.  At most five
bodies compile, whatever N is.  `benchmarks/conditional.py` compares the covers.
"""

import itertools
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

MIN_CHUNK = 8
"""Rows below which a chunk costs as much as one of this size (CPU and TPU)."""


MAX_CHUNK = 512
"""Rows above which a chunk gains nothing: reading the weights is paid off."""


class Cover(NamedTuple):
  """Chunk sizes and how often each runs; all static but the count.

  Attributes:
    sizes: falling chunk sizes, at most N.
    trips: `count -> i32[len(sizes)]`, rounds of each chunk, in that order; of
      an array of counts in NumPy, i64[len(sizes), *counts].
  """

  sizes: tuple[int, ...]
  trips: Callable[[Any], Any]

  def slots(self, count: Int[Array, ""]) -> Int[Array, ""]:
    """Rows executed for `count` selected ones, padding included."""
    return (self.trips(count) * jnp.asarray(self.sizes, jnp.int32)).sum()

  def most(self, n: int) -> int:
    """Rows executed at most for any count of up to `n` rows (static)."""
    return int(np.tensordot(self.sizes, self.trips(np.arange(n + 1)), 1).max())

  def widened(self, batch: int) -> "Cover":
    """A cover for `batch` times the rows, of chunks that repeat these."""
    times = lambda size: min(batch, max(1, MAX_CHUNK // size))
    sizes = {size * times(size) for size in self.sizes} | {self.sizes[-1]}
    return coins(*sorted(sizes, reverse=True))


def ladder(*rungs: int) -> Cover:
  """The smallest of the ascending `rungs` that holds all selected rows."""
  if not _rising(rungs):
    raise ValueError(
      "`rungs` must be whole numbers that ascend from at least 1 to the number"
      f" of items, as in `ladder(64, 256)`; got {rungs}."
    )

  def trips(count):
    rounds = []
    for below, rung in itertools.pairwise((0, *rungs)):
      here = (count > below) & ((count <= rung) | (rung == rungs[-1]))
      rounds.append(here * -(-count // rung))
    return _stack(rounds[::-1])

  return Cover(rungs[::-1], trips)


def tiles(tile: int) -> Cover:
  """Equal chunks of `tile` rows, as many as are needed."""
  return coins(tile)


def coins(*sizes: int) -> Cover:
  """Falling `sizes`, each run as often as it is (nearly) filled."""
  if not _rising(sizes[::-1]):
    raise ValueError(
      "`sizes` must be whole numbers that fall to at least 1 row, as in"
      f" `coins(256, 64)`; got {sizes}."
    )
  slack = sizes[-1]

  def trips(count):
    rounds, left = [], count
    for size in sizes:
      last = size == slack
      paid = (left + (slack - 1 if last else min(slack, size // 8))) // size
      rounds.append(paid)
      left = (left - paid * size).clip(0)
    return _stack(rounds)

  return Cover(sizes, trips)


def cheapest(*sizes: int, price: int) -> Cover:
  """Falling `sizes`, combined so that rows plus `price` per chunk are fewest.

  Args:
    sizes: chunk sizes, falling.
    price: rows that a chunk costs besides its own, to read the weights.
  """
  if not _rising(sizes[::-1]):
    raise ValueError(f"`sizes` must fall to at least 1 row; got {sizes}.")
  cost, change = [0.0], [[0] * len(sizes)]
  for count in range(1, 2 * sizes[0] + 1):  # beyond, the largest is best
    paid = [cost[max(0, count - size)] + size + price for size in sizes]
    best = paid.index(min(paid))
    rounds = list(change[max(0, count - sizes[best])])
    rounds[best] += 1
    cost.append(paid[best])
    change.append(rounds)
  table = np.asarray(change, np.int32)

  def trips(count):
    whole = (count - sizes[0]).clip(0) // sizes[0]
    known = jnp.asarray(table) if isinstance(count, Array) else table
    first, *rest = known.T[:, count - whole * sizes[0]]
    return _stack([first + whole, *rest])

  return Cover(sizes, trips)


def default_cover(n: int) -> Cover:
  """The cover that `bucketed` uses for `n` items; see the module docstring."""
  if n < 1:
    raise ValueError(f"there must be at least 1 item to cover; got {n=}.")
  whole = min(n, MAX_CHUNK)
  sizes = {
    -(-n // (fraction * MIN_CHUNK)) * MIN_CHUNK for fraction in (4, 10, 20, 80)
  }
  sizes = {size for size in sizes if size < whole}
  return coins(*sorted(sizes | {whole}, reverse=True))


def _stack(rounds):
  """In NumPy where the counts are NumPy's, so that it is known beforehand."""
  return (jnp if isinstance(rounds[0], Array) else np).stack(rounds)


def _rising(sizes: tuple[int, ...]) -> bool:
  """Whether `sizes` are whole, positive, and each larger than the last."""
  whole = bool(sizes) and all(isinstance(size, Integral) for size in sizes)
  return whole and sizes[0] >= 1 and list(sizes) == sorted(set(sizes))
