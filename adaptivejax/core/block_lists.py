# SPDX-License-Identifier: Apache-2.0
"""Block lists, which attention runs: block masks as indices.

`BlockLists` say which key blocks each query tile looks at, as a block mask does
(`core.block_masks`), by indices of static capacity: a list costs what it
counts, not its capacity.

    mask = top_k(scores, 8) & causal_blocks(t, s) | sink_blocks(t, s, 4)
    lists = lists_from_mask(mask)

Nobody needs a mask of pairs: within the listed blocks positions, segments and
the causal rule decide who sees whom (`core.sparse_attention`).

Axes: B batch, L heads that own a list (1, the key heads or the query heads H),
Q query tiles, K key blocks, C entries of a list, T queries, S keys, N blocks of
one query.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from adaptivejax.core.block_masks import BLOCK, block_grid, check_sizes
from adaptivejax.core.select import compact
from pallas_kernels.block_sparse_attention import BlockLists


def lists_from_mask(
  mask: Bool[Array, "B L Q K"],
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
  capacity: int | None = None,
  truncate: bool = False,
) -> BlockLists:
  """Lists the blocks that a block mask selects, ascending.

  Args:
    mask: the selection (dynamic); B and L may be 1.
    block_q, block_kv: queries in a tile and keys in a block (static).
    capacity: entries that a list has room for (static); K if not given.
    truncate: a list that selects more keeps its first `capacity` blocks.

  Returns:
    Lists whose entries past `count` repeat the last one.

  Raises:
    ValueError: a list may overflow: less capacity than blocks, not `truncate`.
  """
  _check_mask(mask)
  room = _capacity(capacity, mask.shape[-1], truncate)
  order, count = _compact(mask)
  count = jnp.minimum(count, room)
  return BlockLists(order[..., :room], count, None, block_q, block_kv)


def lists_from_rows(
  mask: Bool[Array, "B L T K"],
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
  capacity: int | None = None,
  truncate: bool = False,
) -> BlockLists:
  """Each query has blocks of its own: a tile lists their union, with `rows`.

  Args:
    mask: the blocks of each query (dynamic); T need not fill the last tile.
    block_q, block_kv, capacity, truncate: as in `lists_from_mask`.
  """
  _check_mask(mask)
  tiles = _tiled(mask, block_q)  # [B, L, Q, block_q, K]
  lists = lists_from_mask(
    tiles.any(-2),
    block_q=block_q,
    block_kv=block_kv,
    capacity=capacity,
    truncate=truncate,
  )
  of_entry = jnp.swapaxes(tiles, -1, -2)
  rows = jnp.take_along_axis(of_entry, lists.index[..., None], axis=3)
  return BlockLists(lists.index, lists.count, rows, block_q, block_kv)


def lists_from_tokens(
  index: Int[Array, "B L T N"],
  blocks: int,
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
  capacity: int | None = None,
  truncate: bool = False,
) -> BlockLists:
  """The same from the indices of each query's blocks.

  Args:
    index: blocks of each query, in any order; -1 for none; twice is once.
    blocks: K (static).
    block_q, block_kv, capacity, truncate: as in `lists_from_mask`.
  """
  return lists_from_rows(
    _hot(index, blocks),
    block_q=block_q,
    block_kv=block_kv,
    capacity=capacity,
    truncate=truncate,
  )


def lists_from_tables(
  kv_num_blocks: Int[Array, "B L Q"],
  kv_indices: Int[Array, "B L Q C"],
  full_kv_num_blocks: Int[Array, "B L Q"] | None = None,
  full_kv_indices: Int[Array, "B L Q C2"] | None = None,
  *,
  blocks: int,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
) -> BlockLists:
  """Lists from the tables of a FlexAttention `BlockMask`.

  PyTorch 2.5, 2024, https://pytorch.org/blog/flexattention/.  Its partial and
  its full blocks are one list here.  Its `mask_mod` is not carried: what it
  hides inside a block is for positions and segments to hide.

  Args:
    kv_num_blocks, kv_indices: partial blocks of each tile.
    full_kv_num_blocks, full_kv_indices: blocks that need no `mask_mod`.
    blocks: K (static).
    block_q, block_kv: its `BLOCK_SIZE` (static).
  """
  if (full_kv_num_blocks is None) != (full_kv_indices is None):
    raise ValueError(
      "`full_kv_num_blocks` and `full_kv_indices` belong together: give both or"
      " neither."
    )
  mask = _hot(_valid(kv_indices, kv_num_blocks), blocks)
  if full_kv_num_blocks is not None and full_kv_indices is not None:
    mask |= _hot(_valid(full_kv_indices, full_kv_num_blocks), blocks)
  return lists_from_mask(mask, block_q=block_q, block_kv=block_kv)


def lists_from_function(
  visible: Callable[[Any, Any], Any],
  queries: int,
  keys: int,
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
) -> BlockLists:
  """Lists every block in which `visible` shows some pair, at trace time.

  It is asked tile by tile about all keys, so memory is that of one tile.  Which
  pairs inside a block are visible remains a matter of positions and segments.

  Args:
    visible: `(q_pos i32[block_q, 1], kv_pos i32[1, S]) -> bool`, elementwise.
    queries, keys: T and S; positions are 0..T-1 and 0..S-1 (static).
    block_q, block_kv: queries in a tile and keys in a block (static).

  Returns:
    Lists with B = L = 1, their capacity that of the longest.
  """
  check_sizes(queries, keys, block_q, block_kv)
  kv_pos = _constants(keys)[None]
  tiles = []
  with jax.ensure_compile_time_eval():
    for start in range(0, queries, block_q):
      q_pos = _constants(min(block_q, queries - start), start)[:, None]
      seen = np.broadcast_to(
        np.asarray(visible(q_pos, kv_pos)), (q_pos.shape[0], keys)
      )
      seen = np.pad(seen.any(0), (0, -keys % block_kv))
      tiles.append(seen.reshape(-1, block_kv).any(1))
    mask = jnp.asarray(np.stack(tiles)[None, None])
    longest = max(1, int(mask.sum(-1).max()))
    return lists_from_mask(
      mask,
      block_q=block_q,
      block_kv=block_kv,
      capacity=longest,
      truncate=True,
    )


def mask_from_lists(lists: BlockLists, blocks: int) -> Bool[Array, "B L Q K"]:
  """The block mask of `lists`; what `rows` says is lost.

  Args:
    lists: entries past `count` are ignored.
    blocks: K (static).
  """
  return _hot(_valid(lists.index, lists.count), blocks)


def full_lists(
  queries: int, keys: int, *, block_q: int = BLOCK, block_kv: int = BLOCK
) -> BlockLists:
  """Every tile looks at every block; B = L = 1."""
  tiles, blocks = block_grid(queries, keys, block_q, block_kv)
  mask = jnp.ones((1, 1, tiles, blocks), bool)
  return lists_from_mask(mask, block_q=block_q, block_kv=block_kv)


def lists_within(
  lists: BlockLists, first: Int[Array, ""] | int, blocks: int
) -> BlockLists:
  """What `lists` name of some neighbouring blocks, counted from the first.

  Args:
    lists: entries ascend, so those of neighbours are a run.
    first: of the blocks (dynamic).
    blocks: how many (static).
  """
  place = lists.index - first
  live = _there(lists) & (place >= 0) & (place < blocks)
  room = min(blocks, lists.index.shape[-1])
  entry = live.argmax(-1)[..., None] + jnp.arange(room)
  entry = jnp.minimum(entry, lists.index.shape[-1] - 1)
  index = jnp.take_along_axis(place, entry, axis=-1)
  rows = lists.rows
  if rows is not None:
    rows = jnp.take_along_axis(rows, entry[..., None], axis=3)
  return BlockLists(
    jnp.clip(index, 0, blocks - 1),
    live.sum(-1, dtype=jnp.int32),
    rows,
    lists.block_q,
    lists.block_kv,
  )


def listed_blocks(lists: BlockLists) -> Int[Array, "B L Q"]:
  """Entries that count, as many as there are."""
  return jnp.clip(lists.count, 0, lists.index.shape[-1])


def _constants(size: int, start: int = 0) -> np.ndarray:
  """Constants, so that a mask function sees no tracers."""
  return np.arange(start, start + size, dtype=np.int32)


def _compact(mask):
  flat = jax.vmap(compact)(mask.reshape(-1, mask.shape[-1]))
  order, count = flat
  return order.reshape(mask.shape), count.reshape(mask.shape[:-1])


def _valid(index, count):
  """Entries past `count` become -1."""
  return jnp.where(jnp.arange(index.shape[-1]) < count[..., None], index, -1)


def _there(lists):
  """Entries that count, bool[B, L, Q, C]."""
  return jnp.arange(lists.index.shape[-1]) < lists.count[..., None]


def _hot(index, blocks):
  """bool[..., K] of the indices i32[..., N]; others are none."""
  inside = (index >= 0) & (index < blocks)
  place = jnp.where(inside, index, blocks)
  flat = place.reshape(-1, index.shape[-1])
  rows = jnp.arange(flat.shape[0])[:, None]
  mask = jnp.zeros((flat.shape[0], blocks), bool)
  mask = mask.at[rows, flat].set(True, mode="drop")
  return mask.reshape(*index.shape[:-1], blocks)


def _tiled(mask, block_q):
  pad = [(0, 0)] * mask.ndim
  pad[2] = (0, -mask.shape[2] % block_q)
  mask = jnp.pad(mask, pad)
  return mask.reshape(*mask.shape[:2], -1, block_q, mask.shape[-1])


def _check_mask(mask):
  if mask.dtype != jnp.bool_ or mask.ndim != 4:
    raise ValueError(
      "`mask` must be a boolean array of 4 axes (batch, list heads, tiles or"
      f" queries, key blocks); got {mask.dtype} of shape {mask.shape}."
    )


def _capacity(capacity, blocks, truncate):
  capacity = blocks if capacity is None else min(capacity, blocks)
  if capacity < 1:
    raise ValueError(f"`capacity` must be at least 1 block; got {capacity}.")
  if capacity < blocks and not truncate:
    raise ValueError(
      f"a list of {capacity=} may overflow: a tile may select all {blocks}"
      " blocks. Leave `capacity` out, or pass `truncate=True` where the"
      " selection is bounded (as by `top_k`) or may be cut."
    )
  return capacity
