# SPDX-License-Identifier: Apache-2.0
r"""Quest: a query reads the pages that may hold the largest products with it.

Tang et al., 2024, https://arxiv.org/abs/2406.10774

Of each page of keys the least and the largest value of each feature, m_d and
M_d, are kept.  No product of a query with a key of the page is larger than

    s = sum_d max(q_d m_d, q_d M_d)

(sec. 3.3, alg. 1), so the pages of the highest s are read, and no others.
Prompts are read densely, and so are the first two layers, where attention is
not sparse.

Primitive: `bound_scores`, then `decode_chosen` of pages (`nn.Choosing`).
Departs: query heads that share keys share pages, by `group_reduce` of their
scores; the published code, for models without sharing, has none.  The page that
is being filled is one of those kept.
Axes: B batch, G key heads, H query heads, N pages, W head width.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from adaptivejax.core.attention_mass import check_reduction, group_reduce
from adaptivejax.core.cache import KVCache
from adaptivejax.core.page_scores import (
  best_pages,
  bound_scores,
  page_bounds,
  page_count,
  pages_there,
  pages_within,
  put_pages,
  written_pages,
)
from adaptivejax.nn.choosing import Choice, Choosing


class Bounds(NamedTuple):
  """Least and largest value of each feature in each page, f[B, G, N, W]."""

  low: Array
  high: Array


class Quest(Choosing):
  """A look at the most promising pages; see `nn.with_look`.

  Args:
    pages: that are kept of a cache (static).
    page: tokens of a page (static).
    dense_layers: the first layers, which look at all keys (static).
    group_reduce: over query heads that share keys: mean, max or sum (static).

  The `Setting` is the share of the pages that is not used, 1 leaves one.
  """

  def __init__(
    self,
    pages: int,
    *,
    page: int = 16,
    dense_layers: int = 2,
    group_reduce: str = "max",
  ):
    check_reduction(group_reduce)
    super().__init__(pages, page, dense_layers)
    self.group_reduce = group_reduce

  def memory(self, batch, heads, slots, width, dtype) -> Bounds:
    count = page_count(slots, self.unit)
    nothing = jnp.zeros((batch, heads, count, width), dtype)
    return Bounds(nothing, nothing)

  def append(self, cache: KVCache, layer, keys, rows=None) -> KVCache:
    cache = super().append(cache, layer, keys, rows)
    new = written_pages(cache, layer, keys.k.shape[2], self.unit)
    bounds = zip(cache.memory, page_bounds(new))
    put = (put_pages(all_pages, layer, new, a) for all_pages, a in bounds)
    return cache._replace(memory=Bounds(*put))

  def choose(self, q, cache: KVCache, layer) -> Choice:
    low, high = cache.recollect(layer)
    score = bound_scores(q, low, high)
    asked = 4.0 * q.size * low.shape[2]
    score = group_reduce(score, low.shape[1], self.group_reduce)
    there = pages_there(cache.read(layer).pos, self.unit)
    filled = pages_within(cache.length, cache.length, self.unit, there.shape[2])
    mask = best_pages(score, self.share_of(self.capacity), there, filled)
    return Choice(self.everywhere(mask, layer), asked)
