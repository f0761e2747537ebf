# SPDX-License-Identifier: Apache-2.0
"""The work list: which tile of rows meets which group.

Rows are sorted by group and cut into tiles of equal height, so a tile with a
border inside is worked on once for each of its groups.  An *item* is a pair
(tile, group) with rows in common.  Items are in order of rows, so those of a
tile follow one another, and so do those of a group.  A group is *visited* if it
has items.

Made of comparisons of all items with all groups: no sort, no scatter, no
`nonzero`, which would each cost more than the list is worth.

Axes: M rows, E groups, I = M / height + E + 1 items at most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Work(NamedTuple):
  """What the kernels read before they start, all i32.

  Attributes:
    count: [], how many of the I items there are; the others are padding.
    group: [I], the group of an item.
    tile: [I], the tile of an item.
    offsets: [E + 2], group e has the rows `offsets[e] .. offsets[e + 1] - 1`;
      group E, without a weight, has those past all groups.
    ordinal: [E + 1], how many groups before e are visited; at E, how many are.
    order: [E], the visited groups in order, then padding.
    begin: [E], the first item of each of them.
  """

  count: jax.Array
  group: jax.Array
  tile: jax.Array
  offsets: jax.Array
  ordinal: jax.Array
  order: jax.Array
  begin: jax.Array


def make_work(sizes: jax.Array, rows: int, height: int, *, sums: bool) -> Work:
  """Lists the items of groups of `sizes`, i32[E], in tiles of `height` rows.

  A map over rows (`sums=False`) must write every row: group E has items, and
  empty groups have none.  A sum over the rows of each group (`sums=True`) must
  write every group: an empty one has one item, and group E has none.
  """
  groups, tiles = len(sizes), rows // height
  ends = jnp.minimum(jnp.cumsum(sizes.astype(jnp.int32)), rows)
  offsets = jnp.concatenate(
    [jnp.zeros(1, jnp.int32), ends, jnp.full(1, rows, jnp.int32)]
  )
  start, end = offsets[:-1], offsets[1:]
  first = jnp.minimum(start // height, tiles - 1)
  length = jnp.where(end > start, (end - 1) // height - first + 1, 0)
  if sums:
    is_group = jnp.arange(groups + 1) < groups
    length = jnp.where(is_group, jnp.maximum(length, 1), 0)
  stop = jnp.cumsum(length)
  begin = stop - length
  item = jnp.arange(tiles + groups + 1)
  group = jnp.minimum(jnp.sum(item[:, None] >= stop, axis=1), groups)
  tile = jnp.clip(first[group] + item - begin[group], 0, tiles - 1)
  visited = length[:groups] > 0
  ordinal = jnp.append(jnp.cumsum(visited) - visited, jnp.sum(visited))
  index = jnp.arange(groups)
  is_nth = visited & (ordinal[:groups] == index[:, None])
  order = jnp.sum(jnp.where(is_nth, index, 0), axis=1)
  lists = (stop[-1], group, tile, offsets, ordinal, order, begin[order])
  return Work(*(x.astype(jnp.int32) for x in lists))
