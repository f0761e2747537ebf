# SPDX-License-Identifier: Apache-2.0
"""Attention to summaries of windows of keys, and what it says of blocks.

A window is `size` keys, the next one begins `stride` later, the first one at 0;
its summary is there for a query once the window's last slot is not after it.

Axes: B batch, T queries, H query heads, G key heads, R query heads of a key
head, N summaries, D head width, K blocks.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.attention import NEVER, Keys
from adaptivejax.core.block_lists import lists_from_mask
from adaptivejax.core.block_masks import visible_blocks
from adaptivejax.core.cost import Cost
from adaptivejax.core.sparse_attention import attend_blocks

TILE = 64
"""Queries of a tile and summaries of a block, where there are as many."""


def exact_scores(
  q: Float[Array, "B T H D"], k: Float[Array, "B G N D"]
) -> Float[Array, "B G R T N"]:
  """Products of queries and summaries, in f32 on every device: they decide."""
  batch, tokens, _, width = q.shape
  q = q.reshape(batch, tokens, k.shape[1], -1, width).astype(jnp.float32)
  exact = lax.Precision.HIGHEST
  k = k.astype(jnp.float32)
  return jnp.einsum("btgrd,bgkd->bgrtk", q, k, precision=exact)


def attend_summaries(
  q: Float[Array, "B T H D"],
  summed: Keys,
  slots: Int[Array, "B T"],
) -> tuple[Float[Array, "B T H D"], Cost]:
  """Softmax attention to the summaries that are there; 0 where none is.

  Args:
    q: queries.
    summed: of keys and of values, `pos` the last slot of each window, rising.
    slots: of the queries, -1 for none.
  """
  tile = {"block_q": min(TILE, q.shape[1]), "block_kv": TILE}
  lists = lists_from_mask(visible_blocks(slots, summed.pos, **tile), **tile)
  found, cost = attend_blocks(q, summed, lists, slots)
  return found.out, cost


def block_worth(
  q: Float[Array, "B T H D"],
  summed: Keys,
  slots: Int[Array, "B T"],
  blocks: int,
  *,
  block: int,
  size: int,
  stride: int,
) -> Float[Array, "B G T K"]:
  """The weights of that attention, summed by block and heads that share keys.

  A window's weight counts once for each of its strides that is in the block:
  Yuan et al., 2025, https://arxiv.org/abs/2502.11089, eq. 9 and 10.

  Args:
    q, summed, slots: as in `attend_summaries`.
    blocks: K (static), which hold the beginnings of all windows.
    block, size, stride: keys (static), the last dividing the others.
  """
  seen = (summed.pos <= slots[:, :, None])[:, None, None]
  score = exact_scores(q, summed.k) * q.shape[3] ** -0.5
  given = jax.nn.softmax(jnp.where(seen, score, NEVER))
  mass = jnp.where(seen, given, 0).sum(2)  # [B, G, T, N]
  per, over = block // stride, size // stride
  spare = (over - 1, per * blocks - mass.shape[-1])
  mass = jnp.pad(mass, [(0, 0), (0, 0), (0, 0), spare])
  parts = [mass[..., n : n + per * blocks] for n in range(over)]
  by_block = jnp.stack(parts).sum(0).reshape(*mass.shape[:3], blocks, per)
  return by_block.sum(-1)
