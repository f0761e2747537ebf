# SPDX-License-Identifier: Apache-2.0
"""Block masks, by which methods say where attention looks.

A block mask `bool[B, L, Q, K]` says which key blocks each query tile looks at.
Masks compose by `&` and `|`; `core.select` makes them from scores (`top_k`,
`top_p`, `threshold` over the last axis), the functions here from positions.

Axes: B batch, L heads that own a list (1, the key heads or the query heads H),
G key heads, P key heads that own positions, Q query tiles, K key blocks,
T queries, S keys, X axes of positions, N tokens, M blocks.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

BLOCK = 128
"""Queries in a tile and keys in a block, where not told otherwise."""


def visible_blocks(
  q_pos: Int[Array, "B T"],
  kv_pos: Int[Array, "B P S"],
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
  causal: bool = True,
  window: int | None = None,
) -> Bool[Array, "B P Q K"]:
  """Blocks that may hold a key visible by position, by extremes of position.

  Exact where positions ascend; else it may name one in vain, never miss one.

  Args:
    q_pos, kv_pos: positions (dynamic); -1 for none.
    block_q, block_kv, causal, window: static; as in `attend_blocks`.
  """
  first_q, last_q = block_extremes(q_pos[:, None], block_q)
  first_k, last_k = block_extremes(kv_pos, block_kv)
  seen = (last_q >= 0)[..., None] & (last_k >= 0)[:, :, None]
  if causal:
    seen &= first_k[:, :, None] <= last_q[..., None]
  if window is not None:
    seen &= last_k[:, :, None] > first_q[..., None] - window
  return seen


def block_extremes(
  pos: Int[Array, "B X N"], block: int
) -> tuple[Int[Array, "B X M"], Int[Array, "B X M"]]:
  """Least and greatest position of each block of `block` (static) tokens.

  Where a block holds none, the least is past all others, the greatest -1.
  """
  none = jnp.iinfo(jnp.int32).max // 2
  pad = [(0, 0)] * (pos.ndim - 1) + [(0, -pos.shape[-1] % block)]
  pos = jnp.pad(pos, pad, constant_values=-1)
  pos = pos.reshape(*pos.shape[:-1], -1, block)
  return jnp.where(pos >= 0, pos, none).min(-1), pos.max(-1)


def causal_blocks(
  queries: int,
  keys: int,
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
  start: Int[Array, ""] | int = 0,
) -> Bool[Array, "1 1 Q K"]:
  """Blocks with a key up to the position of some query of the tile.

  Args:
    queries, keys: T and S (static); key positions are 0..S-1.
    block_q, block_kv: static.
    start: position of the first query (dynamic).
  """
  first, last = _positions(queries, keys, block_q, block_kv, start)
  return (first[1] <= last[0][:, None])[None, None]


def window_blocks(
  queries: int,
  keys: int,
  window: Int[Array, ""] | int,
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
  start: Int[Array, ""] | int = 0,
) -> Bool[Array, "1 1 Q K"]:
  """Blocks with one of the last `window` keys of some query; causal.

  Args:
    window: keys that a query sees, its own included (dynamic).
    queries, keys, block_q, block_kv, start: as in `causal_blocks`.
  """
  first, last = _positions(queries, keys, block_q, block_kv, start)
  near = last[1] > first[0][:, None] - window
  return near[None, None] & causal_blocks(
    queries, keys, block_q=block_q, block_kv=block_kv, start=start
  )


def sink_blocks(
  queries: int,
  keys: int,
  sinks: Int[Array, ""] | int,
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
) -> Bool[Array, "1 1 Q K"]:
  """Blocks with one of the first `sinks` keys (dynamic), for every tile."""
  tiles, blocks = block_grid(queries, keys, block_q, block_kv)
  is_sink = jnp.arange(blocks) * block_kv < sinks
  return jnp.broadcast_to(is_sink, (1, 1, tiles, blocks))


def shared_by_group(
  mask: Bool[Array, "B H Q K"], groups: int
) -> Bool[Array, "B G Q K"]:
  """What any query head of a key head's group looks at.

  One list for the heads of a group makes their products one.
  """
  batch, heads, *rest = mask.shape
  if groups < 1 or heads % groups:
    raise ValueError(f"{heads} heads do not make {groups} groups of one size.")
  return mask.reshape(batch, groups, heads // groups, *rest).any(2)


def _positions(queries, keys, block_q, block_kv, start):
  """First and last position of each query tile, and of each key block."""
  tiles, blocks = block_grid(queries, keys, block_q, block_kv)
  q, k = jnp.arange(tiles) * block_q, jnp.arange(blocks) * block_kv
  last_q = jnp.minimum(q + block_q, queries) - 1
  last_k = jnp.minimum(k + block_kv, keys) - 1
  return (q + start, k), (last_q + start, last_k)


def block_grid(
  queries: int, keys: int, block_q: int, block_kv: int
) -> tuple[int, int]:
  """Q and K: query tiles and key blocks, the last of each perhaps short."""
  check_sizes(queries, keys, block_q, block_kv)
  return -(-queries // block_q), -(-keys // block_kv)


def check_sizes(queries: int, keys: int, block_q: int, block_kv: int) -> None:
  """Raises ValueError unless all are at least 1."""
  if min(queries, keys, block_q, block_kv) < 1:
    raise ValueError(
      f"{queries=}, {keys=}, {block_q=} and {block_kv=} must be at least 1."
    )
