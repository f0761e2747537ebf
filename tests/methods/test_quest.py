# SPDX-License-Identifier: Apache-2.0
"""Law: Quest reads the pages whose bound on the products is highest.

The oracle takes the least and largest keys of each page anew for each token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivejax.core.cache import KVCache, append, crop
from adaptivejax.core.page_scores import (
  bound_scores,
  page_bounds,
  written_pages,
)
from adaptivejax.decode import generate
from adaptivejax.methods.attention import Quest
from adaptivejax.methods.decode import SelfSpeculation
from adaptivejax.nn import adjust, with_look
from tests.methods import choices, host, kv
from tests.methods.kv import T

JOIN = {"max": np.max, "mean": np.mean, "sum": np.sum}


def rule(pages, page, how="max"):
  def chosen(q, k, t):
    for g in range(k.shape[1]):
      group, scores = range(g * choices.R, (g + 1) * choices.R), []
      for p in range(t // page + 1):
        some = k[p * page : (p + 1) * page, g]
        ends = some.min(0), some.max(0)
        each = [sum(np.maximum(q[h] * ends[0], q[h] * ends[1])) for h in group]
        scores.append(JOIN[how](each))
      best = choices.best(scores, pages, first=[t // page])
      yield choices.tokens_of(best, page, t)

  return chosen


@pytest.mark.parametrize(
  ("pages", "page", "how"),
  [(2, 4, "max"), (3, 3, "mean"), (5, 1, "sum"), (2, 40, "max")],
)
def test_reads_what_the_bounds_say(pages, page, how):
  look = Quest(pages, page=page, dense_layers=0, group_reduce=how)
  chosen, gap = choices.check(look, rule(pages, page, how))
  assert all(
    t // page == max(some) // page for (_, t, _), some in chosen.items()
  )
  assert gap > 0.01 or page == 40, "the choice matters"


def test_the_first_layers_are_dense():
  """Layer 1 is read."""
  everything = lambda q, k, t: [range(t + 1)] * kv.G
  choices.check(Quest(1, page=4, dense_layers=2), everything)


def test_the_setting_takes_pages_away():
  look = Quest(4, page=3, dense_layers=0)
  step = jax.jit(lambda *args: Quest.step(*args))
  choices.check(adjust(look, 0.5), rule(2, 3), step=step)
  choices.check(adjust(look, 1.0), rule(1, 3), step=step)
  more = adjust(look, -1.0)  # than the lists hold
  choices.check(more, rule(8, 3), step=step)
  assert step._cache_size() == 2, "one for the prompt, one for a token"


def test_it_costs_what_it_chooses():
  """A page less is 2 keys less, of 4 W FLOPs per head."""
  look = Quest(4, page=2, dense_layers=0)
  model, spent = with_look(host.model(), look), []
  want = host.decode(host.model(), host.TOKENS)[2].full
  for level in (0.0, 0.5, 0.75):
    cost = host.decode(adjust(model, level), host.TOKENS)[2]
    spent.append(float(cost.spent))
    np.testing.assert_allclose(cost.full, want)
  tokens = host.B * host.CONFIG.layers * (host.T - host.PROMPT)
  page = 2 * 4 * host.CONFIG.features * tokens
  np.testing.assert_allclose(np.diff(spent), [-2 * page, -page])


def test_ties_go_to_the_lower_page():
  q, k, v = choices.placed()
  same = np.broadcast_to(k[:, :1], k.shape).copy()
  out, _ = kv.read(Quest(2, page=4, dense_layers=0), q, same, v)
  chosen = choices.sets(rule(2, 4), q, same)
  assert chosen[0, T - 1, 0] == [0, 1, 2, 3, 24, 25]
  want = choices.attended(chosen, q, same, v)
  np.testing.assert_allclose(out, want, atol=2e-5)


def test_what_is_not_read_goes_nowhere():
  """NaN in empty slots; and in whole pages that are read by nobody."""
  choices.check(Quest(2, page=4, dense_layers=0), rule(2, 4), spoil=kv.poisoned)
  look = Quest(1, page=4, dense_layers=1)  # layer 1 is read

  def spoil(cache):
    old = jnp.arange(cache.slots) < cache.length[:, None, None] // 4 * 4
    bad = old[:, None, :, :, None]  # all full pages, their summaries as well
    page = jnp.arange(7) < (cache.length // 4)[:, None]
    nan = lambda a: jnp.where(page[:, None, None, :, None], jnp.nan, a)
    return cache._replace(
      k=jnp.where(bad, jnp.nan, cache.k),
      v=jnp.where(bad, jnp.nan, cache.v),
      memory=jax.tree.map(nan, cache.memory),
    )

  choices.check(look, rule(1, 4), spoil=spoil)


def _summaries(cache, page, layer=1):
  """By brute force, of pages that hold a key."""
  k, pos = np.asarray(cache.k[:, layer]), np.asarray(cache.pos[:, layer, 0])
  for b in range(len(k)):
    for p in range(-(-pos.shape[1] // page)):
      at = range(p * page, min((p + 1) * page, pos.shape[1]))
      held = [s for s in at if pos[b, s] >= 0]
      if held:
        yield b, p, k[b][:, held].min(1), k[b][:, held].max(1)


@pytest.mark.parametrize("page", [1, 3, 4])
def test_bounds_are_those_of_the_keys_that_are_there(page):
  """Step by step, in rows of different lengths, and once drafts are undone."""
  look, seen = Quest(2, page=page, dense_layers=0), 0

  def compare(cache):
    nonlocal seen
    for b, p, low, high in _summaries(cache, page):
      np.testing.assert_array_equal(cache.memory.low[b, 1, :, p], low)
      np.testing.assert_array_equal(cache.memory.high[b, 1, :, p], high)
      seen += 1
    return cache

  q, k, v = choices.placed()
  kv.read(look, q, k, v, spoil=compare)
  assert seen > 100
  cache = with_look(host.model(), look).empty_cache(host.B, host.T)
  model = with_look(host.model(), look)
  cache = model(host.TOKENS[:, :7], cache).cache
  cache = crop(cache, jnp.array([4, 3, 7]))
  compare(model(host.TOKENS[:, 7:8], cache).cache)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 9))
def test_no_product_is_above_its_bound(seed, page, length):
  """For any keys, of any sign and size."""
  rng = np.random.default_rng(seed)
  scale = 10.0 ** rng.uniform(-2, 2, (2, 1, 1, 4))
  draw = lambda *shape: rng.normal(rng.normal(), 1, shape).astype(np.float32)
  q, k = draw(1, 4, 4) * scale[0], draw(1, 2, 9, 4) * scale[1]
  cache = KVCache.empty(1, 1, 2, 9, 4)
  pos = np.where(np.arange(9) < length, np.arange(9), -1)[None, None]
  keys = kv.Keys(
    jnp.asarray(k, jnp.float32), jnp.zeros(k.shape), jnp.asarray(pos)
  )
  cache = append(cache, 0, keys)
  pages = written_pages(cache, 0, 9, page)
  got = bound_scores(jnp.asarray(q, jnp.float32), *page_bounds(pages))
  first = int(pages.index[0, 0])
  for h, s in np.ndindex(4, length):
    product, size = (
      np.dot(q[0, h], k[0, h // 2, s]),
      np.abs(q[0, h]) @ np.abs(k[0, h // 2]).max(0),
    )
    assert got[0, h, s // page - first] >= product - 1e-5 * size


def test_generates_as_before_if_all_pages_fit():
  want = generate(host.model(), host.TOKENS, steps=6, lengths=[10, 3, 7])
  model = with_look(host.model(), Quest(4, page=4, dense_layers=1))
  got = generate(model, host.TOKENS, steps=6, lengths=[10, 3, 7])
  np.testing.assert_array_equal(got.tokens, want.tokens)
  few = with_look(host.model(), Quest(1, page=2, dense_layers=0))
  few = generate(few, host.TOKENS, steps=6, lengths=[10, 3, 7])
  assert (few.tokens != want.tokens).any()


def test_drafts_are_refused():
  """Checked together they would see all keys, and alone few."""
  model = with_look(host.model(), Quest(1, page=2))
  drafts = SelfSpeculation(exit=2, draft=2)
  with pytest.raises(ValueError, match="Quest looks otherwise for one"):
    generate(model, host.TOKENS, steps=3, policy=drafts)


@pytest.mark.parametrize(
  ("how", "words"),
  [
    ({"pages": 0}, "at least 1"),
    ({"pages": 2, "page": 0}, "at least 1"),
    ({"pages": 2, "dense_layers": -1}, "at least 1"),
    ({"pages": 2, "group_reduce": "min"}, "group_reduce='min'"),
  ],
)
def test_bad_input(how, words):
  with pytest.raises(ValueError, match=words):
    Quest(**how)
