# SPDX-License-Identifier: Apache-2.0
"""Rows sorted by group, cut into tiles: what the GPU kernels know beforehand.

Axes: M rows, E groups.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

BLOCK = 8  # a tile is loaded from a multiple of eight rows


class RowTiles(NamedTuple):
  """Tile t makes rows `low[t]:high[t]` of `group[t]`; group E is nobody's.

  It is loaded from `block_start(low[t])` on, and the rows that it makes end at
  most one tile later.  Only the first `count[0]` tiles are meant.
  """

  group: Int[Array, " tiles"]
  low: Int[Array, " tiles"]
  high: Int[Array, " tiles"]
  count: Int[Array, " 1"]


def row_tiles(sizes: Int[Array, " E"], m: int, rows: int) -> RowTiles:
  """Cuts `m` rows into tiles of at most `rows`, none with two groups.

  Args:
    sizes: rows of each group, in order (dynamic); what is left of the `m` rows
      is nobody's, and what is beyond them is cut off.
    m: number of rows, 1 or more (static).
    rows: rows that a tile loads, a multiple of `BLOCK` (static).
  """
  starts, ends = borders(jnp.append(sizes, m), m)
  bases = starts - starts % BLOCK
  tiles = jnp.where(ends > starts, (ends - bases + rows - 1) // rows, 0)
  last = jnp.cumsum(tiles)
  groups = len(sizes) + 1
  most = (m + groups * (BLOCK - 1) + rows - 1) // rows + groups - 1
  t = jnp.arange(most)
  group = jnp.minimum((t[:, None] >= last).sum(1), groups - 1)
  base = bases[group] + (t - (last - tiles)[group]) * rows
  low = jnp.maximum(base, starts[group])
  high = jnp.minimum(base + rows, ends[group])
  return RowTiles(*(a.astype(jnp.int32) for a in (group, low, high, last[-1:])))


def borders(
  sizes: Int[Array, " E"], m: int
) -> tuple[Int[Array, " E"], Int[Array, " E"]]:
  """First row and end of each group, none beyond row `m`."""
  ends = jnp.minimum(jnp.cumsum(sizes), m).astype(jnp.int32)
  return jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends


def block_start(row: Int[Array, ""]) -> Int[Array, ""]:
  """The multiple of eight at or below `row`."""
  return lax.div(row, jnp.int32(BLOCK)) * BLOCK


def whole_blocks(x: Array) -> Array:
  """Pads the rows with zeros to a multiple of eight."""
  more = -len(x) % BLOCK
  return jnp.pad(x, ((0, more), (0, 0))) if more else x
