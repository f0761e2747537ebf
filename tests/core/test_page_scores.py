# SPDX-License-Identifier: Apache-2.0
"""Law: pages are chosen by their scores, and known by the keys they hold."""

import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.attention import Keys
from adaptivejax.core.cache import KVCache, append, commit_path
from adaptivejax.core.page_scores import (
  best_pages,
  bound_scores,
  page_bounds,
  page_means,
  pages_there,
  pages_within,
  put_pages,
  sum_pages,
  written_pages,
)

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
  ("score", "keep", "forced", "want"),
  [
    ([1, 3, 2, 3, 9], 2, [], [1, 3]),  # the last one is not there
    ([3, 3, 3, 3, 3], 2, [], [0, 1]),
    ([1, 3, 2, 3, 9], 2, [0], [0, 1]),
    ([1, 3, 2, 3, 9], 1, [0, 2], [0, 2]),
    ([NAN, 3, INF, -INF, 9], 4, [], [1]),
    ([NAN, 3, 2, 1, 9], 2, [0, 4], [0, 1]),
    ([1, 3, 2, 3, 9], 0, [], []),
    ([1, 3, 2, 3, 9], 9, [], [0, 1, 2, 3]),
  ],
)
def test_best_pages(score, keep, forced, want):
  there = jnp.arange(5) < 4
  first = jnp.isin(jnp.arange(5), jnp.asarray(forced, jnp.int32))
  got = best_pages(
    jnp.asarray([[score]], jnp.float32), keep, there[None, None],
    first[None, None],
  )  # fmt: skip
  assert np.flatnonzero(got[0, 0]).tolist() == want


def test_pages_of_slots():
  pos = jnp.array([[[0, -1, -1, -1, -1, 4, 5]]])
  np.testing.assert_array_equal(pages_there(pos, 2)[0, 0], [1, 0, 1, 1])
  np.testing.assert_array_equal(sum_pages(pos, 3)[0, 0], [-2, 2, 5])
  got = pages_within(jnp.array([3, 4, 9]), jnp.array([3, 6, 9]), 2, 4)
  np.testing.assert_array_equal(
    got[:, 0], [[0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
  )
  none = pages_within(0, -1, 2, 4)
  assert not none.any()


def _keys(seed, pos):
  pos = jnp.asarray(pos, jnp.int32)
  k = np.random.default_rng(seed).normal(size=(len(pos), 2, pos.shape[1], 4))
  return Keys(
    jnp.asarray(k, jnp.float32), jnp.asarray(k, jnp.float32), pos[:, None]
  )


@pytest.mark.parametrize("page", [1, 2, 3, 5])
def test_summaries_follow_what_is_written_and_moved(page):
  """Step by step, trees of drafts of which a path is kept among them."""
  slots = 23
  cache = KVCache.empty(1, 2, 2, slots, 4)
  count = -(-slots // page)
  low = high = means = jnp.zeros((2, 2, count, 4))

  def written(cache, tokens):
    nonlocal low, high, means
    pages = written_pages(cache, 0, tokens, page)
    a, b = page_bounds(pages)
    put = lambda summary, new: put_pages(summary[:, None], 0, pages, new)[:, 0]
    low, high, means = map(put, (low, high, means), (a, b, page_means(pages)))
    pos, k = np.asarray(cache.pos[:, 0, 0]), np.asarray(cache.k[:, 0])
    for row, p in np.ndindex(2, count):
      at = range(p * page, min((p + 1) * page, slots))
      held = k[row][:, [s for s in at if pos[row, s] >= 0]]
      if held.size:
        np.testing.assert_array_equal(low[row, :, p], held.min(1))
        np.testing.assert_array_equal(high[row, :, p], held.max(1))
        np.testing.assert_allclose(means[row, :, p], held.mean(1), atol=1e-6)

  prompt = [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, -1, -1, -1, -1]]
  cache = append(cache, 0, _keys(0, prompt))
  written(cache, 7)
  cache = cache.advance(jnp.array([7, 3]))
  for seed in (1, 2):
    start = np.asarray(cache.length)[:, None]
    tree = start + np.array([[0, 1, 1, 2, 2, 3]] * 2)
    cache = append(cache, 0, _keys(seed, tree))
    written(cache, 6)
    path = jnp.array([[0, 2, 4, 5, 0, 0], [0, 1, 3, 0, 0, 0]])
    cache = commit_path(cache, path, jnp.array([4, 2]))


def test_bounds_are_sums_of_the_larger_product():
  draw = lambda seed, *shape: jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )
  q, a, b = draw(0, 2, 4, 8), draw(1, 2, 2, 3, 8), draw(2, 2, 2, 3, 8)
  low, high = jnp.minimum(a, b), jnp.maximum(a, b)
  got = bound_scores(q, low, high)
  for row, h, p in np.ndindex(2, 4, 3):
    ends = q[row, h] * low[row, h // 2, p], q[row, h] * high[row, h // 2, p]
    want = np.maximum(*ends).sum()
    np.testing.assert_allclose(got[row, h, p], want, rtol=1e-4, atol=1e-5)
