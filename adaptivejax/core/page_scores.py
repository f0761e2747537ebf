# SPDX-License-Identifier: Apache-2.0
"""What pages of a cache are worth to a query, told without reading them.

A page is P neighbouring slots.  A summary of its keys (bounds of each feature,
or the mean) is kept beside the cache; writing T tokens makes the summaries anew
of the few pages that they, or T tokens before them, can lie in, so that drafts
taken back or moved (`crop`, `commit_path`) leave no trace behind.

Axes: B batch, S slots, N pages, M of them, P slots of a page, H query heads,
G key heads, L heads that own a choice (1 or G), D head width.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.cache import KVCache
from adaptivejax.core.select import top_k


class Pages(NamedTuple):
  """Some pages of one layer.

  Attributes:
    k: their keys, f[B, G, M, P, D].
    there: which slots hold a key, bool[B, 1 or G, M, P].
    index: which pages these are, i32[B, M], rising by 1.
  """

  k: Array
  there: Array
  index: Array


def page_count(slots: int, page: int) -> int:
  """Pages of a cache; the last one may be cut off (all static)."""
  return -(-slots // page)


def written_pages(
  cache: KVCache,
  layer: Int[Array, ""] | int,
  keys: Keys,
  page: int,
  rows: Bool[Array, " B"] | None = None,
) -> Pages:
  """The pages that T new tokens, or as many before, lie in once they are there.

  The cache is read as it was before: to write first would copy it all.

  Args:
    cache: without the new tokens.
    layer: which one (dynamic).
    keys: of the new tokens, which go to the next slots.
    page: P (static).
    rows: which are written (dynamic); all if None.
  """
  count, tokens = page_count(cache.slots, page), keys.pos.shape[-1]
  many = min((2 * tokens - 2) // page + 2, count)
  first = jnp.maximum(cache.length - tokens, 0) // page
  first = jnp.minimum(first, count - many)
  index = first[:, None] + jnp.arange(many, dtype=jnp.int32)  # [B, M]
  slot = first[:, None] * page + jnp.arange(many * page)
  row, inside = jnp.arange(len(index))[:, None], slot < cache.slots
  slot = jnp.minimum(slot, cache.slots - 1)
  at = cache.positions(tokens) - first[:, None] * page
  if rows is not None:
    at = jnp.where(rows[:, None], at, many * page)

  def read(old, new):
    """[B, X, M * P, ...] of [B, layers, X, S, ...] and [B, X, T, ...]."""
    new = jnp.moveaxis(new, 2, 1).astype(old.dtype)
    window = old[row, layer, :, slot].at[row, at].set(new, mode="drop")
    return jnp.moveaxis(window, 2, 1)

  k, pos = read(cache.k, keys.k), read(cache.pos, keys.pos)
  there = (pos >= 0) & inside[:, None]
  shape = many, page
  return Pages(
    k.reshape(*k.shape[:2], *shape, k.shape[-1]),
    there.reshape(*there.shape[:2], *shape),
    index,
  )


def page_bounds(
  pages: Pages,
) -> tuple[Float[Array, "B G M D"], Float[Array, "B G M D"]]:
  """Least and largest value of each feature; 0 in a page without keys."""
  there = pages.there[..., None]
  some = there.any(3)
  low = jnp.where(there, pages.k, jnp.inf).min(3)
  high = jnp.where(there, pages.k, -jnp.inf).max(3)
  return jnp.where(some, low, 0), jnp.where(some, high, 0)


def page_means(pages: Pages) -> Float[Array, "B G M D"]:
  """The mean key, in f32; 0 in a page without keys."""
  there = pages.there[..., None]
  total = jnp.where(there, pages.k.astype(jnp.float32), 0).sum(3)
  return total / jnp.maximum(there.sum(3), 1)


def put_pages(
  summary: Float[Array, "B G N D"], pages: Pages, new: Float[Array, "B G M D"]
) -> Float[Array, "B G N D"]:
  """The summary of all pages, with what is new of some."""
  row = jnp.arange(len(summary))[:, None]
  new = jnp.moveaxis(new, 2, 1).astype(summary.dtype)
  return summary.at[row, :, pages.index].set(new)


def pages_there(pos: Int[Array, "B L S"], page: int) -> Bool[Array, "B L N"]:
  """Pages that hold a key."""
  return sum_pages((pos >= 0).astype(jnp.int32), page) > 0


def pages_within(
  first: Int[Array, " B"] | int, last: Int[Array, " B"] | int, page: int,
  count: int,
) -> Bool[Array, "B 1 N"]:  # fmt: skip
  """Pages of `count` that hold any of the slots `first`..`last` (dynamic)."""
  begin = jnp.arange(count) * page
  edge = lambda slot: jnp.reshape(jnp.asarray(slot), (-1, 1, 1))
  return (begin + page > edge(first)) & (begin <= edge(last))


def sum_pages(a: Array, page: int) -> Array:
  """Sums over the slots of each page, [B, L, N] from [B, L, S]."""
  spare = -a.shape[2] % page
  padded = jnp.pad(a, ((0, 0), (0, 0), (0, spare)))
  return padded.reshape(*a.shape[:2], -1, page).sum(3)


def bound_scores(
  q: Float[Array, "B H D"],
  low: Float[Array, "B G N D"],
  high: Float[Array, "B G N D"],
) -> Float[Array, "B H N"]:
  """No product of the query with a key of the page is larger, in f32.

  sum_d max(q_d low_d, q_d high_d), as two matrix products: where q_d is
  positive high_d counts, else low_d.
  """
  up, down = jnp.maximum(q, 0), jnp.minimum(q, 0)
  return key_scores(up, high) + key_scores(down, low)


def key_scores(
  q: Float[Array, "B H D"], k: Float[Array, "B G N D"]
) -> Float[Array, "B H N"]:
  """Products of queries with the keys of their group, in f32."""
  grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2]).astype(jnp.float32)
  score = jnp.einsum("bgrd,bgnd->bgrn", grouped, k.astype(jnp.float32))
  return score.reshape(len(q), -1, k.shape[2])


def best_pages(
  score: Float[Array, "B L N"],
  keep: Int[Array, "..."] | int,
  there: Bool[Array, "B P N"],
  forced: Bool[Array, "B P N"],
) -> Bool[Array, "B L N"]:
  """The best pages, ties by index.

  Args:
    score: one that is not finite is that of the worst page.
    keep: pages to choose, one number or i32[B, L] (dynamic).
    there: pages that may be chosen; P is 1 or L.
    forced: pages that are chosen first if they are there, all of them even if
      they are more than `keep`.
  """
  forced = forced & there
  score = jnp.where(there & jnp.isfinite(score), score, jnp.nan)
  score = jnp.where(forced, jnp.inf, score)
  most = jnp.maximum(keep, forced.sum(-1))
  most = jnp.broadcast_to(most, score.shape[:2])
  return top_k(score, most)
