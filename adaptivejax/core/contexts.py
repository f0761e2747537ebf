# SPDX-License-Identifier: Apache-2.0
"""Contexts that were read apart from one another, looked at together.

Axes: B batch, L layers, N contexts, M tokens of one, C tokens of all, P prefix
tokens, T queries, H query heads, G key heads, W head width, X any of heads.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.block_lists import full_lists
from adaptivejax.core.cache import KVCache
from adaptivejax.core.sparse_attention import attend_blocks
from adaptivejax.core.sparse_decode import sparse_decode
from pallas_kernels.block_sparse_attention import Rule, merge_lse

FEW = 16
"""Queries that the decoding kernel takes."""


class Contexts(NamedTuple):
  """The keys of contexts, one context after the other.

  Attributes:
    k, v: f[B, G, C, W], or [B, L, G, C, W] of all layers.
    pos: -1 for none, i32[B, 1, C], or [B, L, 1, C].
  """

  k: Array
  v: Array
  pos: Array

  @classmethod
  def empty(cls, batch: int, heads: int, size: int, width: int, dtype):
    """Room for C = `size` tokens; all arguments are static."""
    nothing = jnp.zeros((batch, heads, size, width), dtype)
    return cls(nothing, nothing, jnp.full((batch, 1, size), -1, jnp.int32))

  @classmethod
  def of_rows(cls, cache: KVCache, start: int, count: int) -> "Contexts":
    """The rows of a cache, B * N of them, as the N contexts of B rows.

    Args:
      cache: of P + M slots, the last M those of a context.
      start: P (static).
      count: N (static).
    """

    def joined(a):
      """[B, L, X, N * M, ...] from [B * N, L, X, P + M, ...]."""
      a = a[:, :, :, start:]
      a = jnp.moveaxis(a.reshape(-1, count, *a.shape[1:]), 1, 3)
      return a.reshape(*a.shape[:3], -1, *a.shape[5:])

    return cls(*map(joined, (cache.k, cache.v, cache.pos)))


def attend_apart(
  q: Float[Array, "B T H W"],
  contexts: Contexts,
  keys: Keys,
  positions: Int[Array, "B T"],
  temperature: Float[Array, ""] | float = 1.0,
  scale: Float[Array, ""] | float = 1.0,
) -> Float[Array, "B T H W"]:
  """Attention to contexts, at a temperature, and to other keys, merged.

  Args:
    q: queries.
    contexts: all their keys are seen.
    keys: seen up to the position of a query.
    positions: of the queries, -1 for none.
    temperature: by which scores of contexts are divided (dynamic).
    scale: of the log of the sum of their exponents, which is multiplied by
      `temperature * scale` before it is weighed against the rest (dynamic).
  """
  sharp = (q / temperature).astype(q.dtype)
  there = Keys(contexts.k, contexts.v, contexts.pos)
  far, far_lse = attend_with_lse(sharp, there, positions, causal=False)
  near, near_lse = attend_with_lse(q, keys, positions)
  lse = jnp.stack([temperature * scale * far_lse, near_lse])
  return merge_lse(jnp.stack([far, near]), lse)[0]


def attend_with_lse(
  q: Float[Array, "B T H W"],
  keys: Keys,
  positions: Int[Array, "B T"],
  *,
  causal: bool = True,
) -> tuple[Float[Array, "B T H W"], Float[Array, "B T H"]]:
  """`attend`, and the log of the sum of the exponents; -inf of nothing."""
  if q.shape[1] <= FEW:
    rule = Rule(causal=causal)
    found, _ = sparse_decode(q, keys, None, positions, rule=rule)
    return found.out, jnp.swapaxes(found.lse, 1, 2)
  lists = full_lists(q.shape[1], keys.k.shape[2])
  found, _ = attend_blocks(q, keys, lists, positions, causal=causal)
  return found.out, found.lse
