# SPDX-License-Identifier: Apache-2.0
r"""Kinetics: block top-k attention, and what generation costs with it.

Sadhukhan et al., 2025, https://arxiv.org/abs/2506.05333

Generation is bound by memory, not by compute, so long texts and many trials are
worth it only where attention is sparse; `kinetics_cost` is the law that says
when (`core.generation_cost`).  It is sparse by block top-k (sec. 5): a token
looks at the first few tokens, at a local window and, per key head, at the pages
P of the highest mean product,

    s_P = mean_{h in group, j in P} q_h . k_j = mean_h q_h . mean_{j in P} k_j,

for which the mean key of each page is kept.  The first layer looks at all keys.

Primitive: `key_scores`, then `decode_chosen` of pages (`nn.Choosing`).
Departs: pages are counted from token 0, not from the end of the first tokens,
and one that holds a first or a local token is read whole.
Axes: B batch, G key heads, H query heads, N pages, W head width.
"""

import jax.numpy as jnp

from adaptivejax.core.attention_mass import check_reduction, group_reduce
from adaptivejax.core.cache import KVCache
from adaptivejax.core.generation_cost import generation_cost as kinetics_cost
from adaptivejax.core.page_scores import (
  best_pages,
  key_scores,
  page_count,
  page_means,
  pages_there,
  pages_within,
  put_pages,
  written_pages,
)
from adaptivejax.nn.choosing import Choice, Choosing

__all__ = ["Kinetics", "kinetics_cost"]


class Kinetics(Choosing):
  """Block top-k attention; see `nn.with_look`.

  Args:
    pages: of the highest mean product (static).
    page: tokens of a page (static).
    sinks, local: first and last tokens, seen besides (static).
    dense_layers: the first layers, which look at all keys (static).
    group_reduce: over query heads that share keys: mean, max or sum (static).

  The `Setting` is the share of the pages that is not used.
  """

  def __init__(
    self, pages: int = 64, *, page: int = 16, sinks: int = 4, local: int = 64,
    dense_layers: int = 1, group_reduce: str = "mean",
  ):  # fmt: skip
    check_reduction(group_reduce)
    if pages < 1 or sinks < 0 or local < 1:
      raise ValueError(
        f"{pages=} and {local=} must be at least 1, {sinks=} not negative."
      )
    ends = -(-sinks // page) + (local + page - 2) // page + 1
    super().__init__(pages + ends, page, dense_layers)
    self.pages, self.sinks, self.local = pages, sinks, local
    self.group_reduce = group_reduce

  def memory(self, batch, heads, slots, width, dtype):
    count = page_count(slots, self.unit)
    return jnp.zeros((batch, heads, count, width), jnp.float32)  # the means

  def append(self, cache: KVCache, layer, keys, rows=None) -> KVCache:
    cache = super().append(cache, layer, keys, rows)
    new = written_pages(cache, layer, keys.k.shape[2], self.unit)
    means = put_pages(cache.memory, layer, new, page_means(new))
    return cache._replace(memory=means)

  def choose(self, q, cache: KVCache, layer) -> Choice:
    means = cache.recollect(layer)
    groups, count = means.shape[1:3]
    score = group_reduce(key_scores(q, means), groups, self.group_reduce)
    there, now = pages_there(cache.read(layer).pos, self.unit), cache.length
    ends = pages_within(now - self.local + 1, now, self.unit, count)
    ends |= pages_within(0, self.sinks - 1, self.unit, count)
    keep = self.share_of(self.pages, 0) + (ends & there).sum(-1)
    mask = best_pages(score, keep, there, ends)
    return Choice(self.everywhere(mask, layer), 2.0 * q.size * count)
