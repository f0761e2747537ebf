# SPDX-License-Identifier: Apache-2.0
"""Tokens that all query heads elect together, and when to elect anew.

Axes: B batch, S slots, H query heads, G key heads, W head width.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from adaptivejax.core.attention import NEVER
from adaptivejax.core.attention_mass import group_reduce
from adaptivejax.core.page_scores import key_scores


def soft_votes(
  q: Float[Array, "B H W"],
  k: Float[Array, "B G S W"],
  eligible: Bool[Array, "B 1 S"],
  *,
  kernel: int = 1,
  axis_name: str | None = None,
) -> Float[Array, "B 1 S"]:
  """What each token gets if every head gives 1, by softmax of its products.

  Args:
    q: queries.
    k: keys.
    eligible: tokens that may be elected; the others' votes are NaN.
    kernel: neighbours whose most votes a token gets, odd (static).
    axis_name: mesh axis of `jax.shard_map` over which heads are spread; all of
      them vote.
  """
  score = key_scores(q, k)
  counts = eligible & jnp.isfinite(score)
  odds = jax.nn.softmax(jnp.where(counts, score, NEVER), axis=-1)
  odds = jnp.where(counts, odds, 0)
  votes = group_reduce(odds, 1, "sum", axis_name)
  if kernel > 1:
    span, one = (1, 1, kernel), (1, 1, 1)
    votes = lax.reduce_window(votes, 0.0, lax.max, span, one, "SAME")
  return jnp.where(eligible, votes, jnp.nan)


def cosine(
  a: Float[Array, "B H W"],
  b: Float[Array, "B H W"],
  axis_name: str | None = None,
) -> Float[Array, " B"]:
  """Between two queries, all heads at once; -inf where one of them is 0.

  Args:
    a, b: the queries.
    axis_name: as for `soft_votes`.
  """
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  pairs = (a, b), (a, a), (b, b)
  sums = jnp.stack([(x * y).sum((1, 2)) for x, y in pairs])
  if axis_name is not None:
    sums = lax.psum(sums, axis_name)
  norm = jnp.sqrt(sums[1] * sums[2])
  return jnp.where(norm > 0, sums[0] / jnp.where(norm > 0, norm, 1), -jnp.inf)
