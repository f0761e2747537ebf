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
  cache: KVCache, layer: Int[Array, ""] | int, tokens: int, page: int
) -> Pages:
  """The pages that the next `tokens`, or as many before, can lie in.

  Args:
    cache: the next tokens are written, and not counted by its `length` yet.
    layer: which one (dynamic).
    tokens: T (static).
    page: P (static).
  """
  count = page_count(cache.slots, page)
  many = min((2 * tokens - 2) // page + 2, count)
  first = jnp.maximum(cache.length - tokens, 0) // page
  first = jnp.minimum(first, count - many)
  index = first[:, None] + jnp.arange(many, dtype=jnp.int32)  # [B, M]
  slot = (index[..., None] * page + jnp.arange(page)).reshape(len(index), -1)
  row, inside = jnp.arange(len(index))[:, None], slot < cache.slots
  slot = jnp.minimum(slot, cache.slots - 1)
  heads_first = lambda a: jnp.moveaxis(a[row, layer, :, slot], 2, 1)
  k, pos = heads_first(cache.k), heads_first(cache.pos)
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
  summary: Float[Array, "B layers G N D"],
  layer: Int[Array, ""] | int,
  pages: Pages,
  new: Float[Array, "B G M D"],
) -> Float[Array, "B layers G N D"]:
  """The summary of all pages of all layers, with what is new of some.

  They are written where they lie: a layer that is taken out, changed and put
  back has XLA copy all layers in every loop body.
  """
  row = jnp.arange(len(summary))[:, None]
  new = jnp.moveaxis(new, 2, 1).astype(summary.dtype)
  return summary.at[row, layer, :, pages.index].set(new)


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
