# SPDX-License-Identifier: Apache-2.0
"""Attention over blocks and, besides, over single keys: columns.

Columns are gathered, so that a few keys anywhere cost what they count and not
the blocks that they lie in.  Blocks and columns are two passes of attention
over disjoint keys, merged by their log-sum-exps: exact.

Axes: B batch, T queries, S keys, H query heads, G key heads, R query heads of a
key head, D head width, Q query tiles, K key blocks, V room for columns.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.block_lists import lists_from_mask
from adaptivejax.core.block_masks import BLOCK, visible_blocks
from adaptivejax.core.block_scores import shared_positions
from adaptivejax.core.cost import Cost
from adaptivejax.core.select import compact
from adaptivejax.core.sparse_attention import attend_blocks
from pallas_kernels.attention_mass import attention_mass
from pallas_kernels.block_sparse_attention import Marks, merge_lse


def attend_columns(
  q: Float[Array, "B T H D"],
  keys: Keys,
  mask: Bool[Array, "B H Q K"],
  columns: Bool[Array, "B H S"],
  positions: Int[Array, "B T"],
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
  room: int | None = None,
) -> tuple[Float[Array, "B T H D"], Cost]:
  """Causal attention of each head over its blocks and its columns.

  Args:
    q: queries.
    keys: keys and values, the same positions for all heads.
    mask: blocks of each tile and head (dynamic).
    columns: keys that all tiles of a head see (dynamic).
    positions: of the queries; -1 sees nothing.
    block_q, block_kv: static.
    room: V, columns of a head at most (static); S if not given.  It keeps the
      first ones.

  Returns:
    `(out, cost)`, of blocks and columns.

  Raises:
    ValueError: no room, or key heads that hold different keys.
  """
  shared_positions(keys)
  if room is not None and room < 1:
    raise ValueError(f"{room=} must be at least 1 column.")
  size, groups = keys.pos.shape[-1], keys.k.shape[1]
  room = size if room is None else min(room, size)
  blocks = {"block_q": block_q, "block_kv": block_kv}
  columns = useful_columns(mask, columns, positions, keys, **blocks)

  def one(head):
    """Of each key head's query heads, one: [B, T, G, D] and so on."""
    q, mask, columns = head
    order, count = jax.vmap(jax.vmap(compact))(columns)
    kept = jnp.arange(room) < count[..., None]
    order = order[..., :room]
    taken = (columns & (jnp.cumsum(columns, -1) <= room)) | (keys.pos < 0)
    rest = keys._replace(pos=jnp.where(taken, -1, keys.pos))
    pos = jnp.broadcast_to(keys.pos, columns.shape)
    pos = jnp.where(kept, jnp.take_along_axis(pos, order, axis=2), -1)
    pick = lambda a: jnp.take_along_axis(a, order[..., None], axis=2)
    lone = Keys(pick(keys.k), pick(keys.v), pos)
    seen = visible_blocks(positions, pos, **blocks)
    near, a = attend_blocks(q, rest, lists_from_mask(mask, **blocks), positions)
    far, b = attend_blocks(q, lone, lists_from_mask(seen, **blocks), positions)
    pair = lambda name: jnp.stack([getattr(near, name), getattr(far, name)])
    return merge_lse(pair("out"), pair("lse"))[0], a + b

  # Key heads mark keys, query heads choose them: one of each group at a time.
  lead = lambda a, axis: jnp.moveaxis(
    a.reshape(*a.shape[:axis], groups, -1, *a.shape[axis + 1 :]), axis + 1, 0
  )
  out, cost = lax.map(one, (lead(q, 2), lead(mask, 1), lead(columns, 1)))
  return jnp.moveaxis(out, 0, 3).reshape(q.shape), cost.total()


def useful_columns(
  mask: Bool[Array, "B H Q K"],
  columns: Bool[Array, "B H S"],
  positions: Int[Array, "B T"],
  keys: Keys,
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
) -> Bool[Array, "B H S"]:
  """Columns whose block is not in the lists of all tiles that may see it."""
  seen = visible_blocks(positions, keys.pos, block_q=block_q, block_kv=block_kv)
  missing = (seen & ~mask).any(2)
  missing = jnp.repeat(missing, block_kv, axis=-1)[..., : columns.shape[-1]]
  return columns & missing


def coverage(
  q: Float[Array, "B T H D"],
  keys: Keys,
  mask: Bool[Array, "B H Q K"],
  columns: Bool[Array, "B H S"] | None,
  positions: Int[Array, "B T"],
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
  since: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "B H"], Float[Array, "B H"]]:
  """How much of attention the chosen blocks and columns keep.

  Offline: all pairs are computed, though never held at once.

  Args:
    q, keys, mask, columns, positions, block_q, block_kv: as above.
    since: queries from this position on count (dynamic), for the mass.

  Returns:
    `(mass, pairs)`, shares of all: of the true attention, and of the keys that
    each tile would compute.
  """
  size = {"block_q": block_q, "block_kv": block_kv}
  asked = (positions >= since) & (positions >= 0)
  mass = attention_mass(
    jnp.swapaxes(q, 1, 2),
    keys.k,
    marks=Marks(positions, shared_positions(keys)[:, None]),
    block_q=block_q,
    q_weight=asked.astype(jnp.float32),
  )  # [B, H, Q, S]
  spread = lambda a: jnp.repeat(a, block_kv, axis=-1)[..., : mass.shape[-1]]
  seen = spread(visible_blocks(positions, keys.pos, **size))
  seen &= (keys.pos >= 0)[:, :, None]
  chosen = spread(mask)
  if columns is not None:
    chosen |= columns[:, :, None]
  share = lambda a: (
    jnp.where(chosen, a, 0).sum((2, 3))
    / jnp.maximum(a.sum((2, 3)), jnp.finfo(jnp.float32).tiny)
  )
  return share(mass), share(seen.astype(jnp.float32))
