# SPDX-License-Identifier: Apache-2.0
"""Law: the table is a dictionary of dictionaries, its tree the likeliest."""

import collections
import heapq

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.trees import ABSENT, depths
from adaptivejax.core.trigrams import (
  Recent,
  TrigramTable,
  likeliest,
  successors,
)

V, K, SIZE, WINDOW = 5, 3, 16, 6
RATE, CAP = 0.25, 1.5  # exact in f32
texts = st.lists(
  st.lists(st.integers(0, V - 1), min_size=0, max_size=40), max_size=4
)
update = jax.jit(Recent.update)
follow = jax.jit(successors)


def count(texts):
  """Shares of the K commonest successors; the lower token of equals."""
  found = collections.defaultdict(collections.Counter)
  for text in texts:
    for a, b, c in zip(text, text[1:], text[2:]):
      found[a, b][c] += 1
  return {
    context: {
      c: n / sum(tally.values())
      for c, n in sorted(tally.items(), key=lambda cn: (-cn[1], cn[0]))[:K]
    }
    for context, tally in found.items()
  }


def as_dict(tokens, weight):
  tokens, weight = np.asarray(tokens), np.asarray(weight)
  assert len(set(tokens[weight > 0])) == (weight > 0).sum(), "a token twice"
  return {int(t): float(w) for t, w in zip(tokens, weight) if w > 0}


def lookups(table, recent=None):
  recent = Recent.empty(SIZE) if recent is None else recent
  pairs = jnp.asarray([(a, b) for a in range(V) for b in range(V)])
  tokens, weight = every(table, recent, pairs)
  rows = zip(map(tuple, pairs.tolist()), np.asarray(tokens), np.asarray(weight))
  return {pair: found for pair, t, w in rows if (found := as_dict(t, w))}


@jax.jit
def every(table, recent, pairs):
  return jax.vmap(lambda pair: successors(table, recent, pair, CAP))(pairs)


def close(got, want):
  assert got.keys() == want.keys()
  for key in want:
    assert got[key] == pytest.approx(want[key], rel=1e-6), key


@hypothesis.given(texts=texts)
def test_build_counts(texts):
  close(lookups(TrigramTable.build(texts, successors=K)), count(texts))


def test_build_keeps_the_commonest():
  text = np.random.default_rng(0).integers(0, V, 600).tolist()
  close(lookups(TrigramTable.build([text], successors=K)), count([text]))


def test_every_context_of_a_large_corpus_is_found():
  """Collisions and a crowded table lose nothing."""
  text = np.random.default_rng(0).integers(0, 50_000, 6000)
  table = TrigramTable.build([text, text[:1], text[:0]], successors=2)
  pairs = jnp.stack([text[:-2], text[1:-1]], 1)
  tokens, share = jax.jit(jax.vmap(table.lookup))(pairs)
  assert (jnp.where(share > 0, tokens, -1) == text[2:, None]).any(1).all()
  # and nothing else is: no pair of which the second was never seen
  strange = pairs.at[:, 1].add(50_000)
  assert (jax.vmap(table.lookup)(strange)[0] == -1).all()


def learned(windows, size):
  """The dictionary of a row, by insertion; the oldest goes when full."""
  added = collections.OrderedDict()
  for window in windows:
    found = list(zip(window, window[1:], window[2:]))
    found = [t for t in found if min(t) >= 0]
    old = set(added)
    for trigram in found:
      if trigram in old or trigram in added:
        added[trigram] = added[trigram] + RATE
      else:
        added[trigram] = RATE
    for trigram in added:
      added[trigram] = min(added[trigram], CAP)
    while len(added) > size:
      added.popitem(last=False)
  return added


def windows_of(text, stride=1):
  """What a row shows the table as it grows by `stride` tokens a step."""
  padded = [-1] * (WINDOW - 1) + list(text)
  return [padded[i : i + WINDOW] for i in range(0, len(text), stride)]


@hypothesis.given(
  corpus=texts,
  text=st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 4]), max_size=40),
  stride=st.sampled_from([1, WINDOW]),
)
@hypothesis.example(corpus=[], text=[0] * 12 + [1, 0, 0, 0], stride=WINDOW)
@pytest.mark.parametrize("size", [8, 64])
def test_row_learns_as_a_dictionary(size, corpus, text, stride):
  table, recent = TrigramTable.build(corpus, successors=K), Recent.empty(size)
  for window in windows_of(text, stride):
    recent = update(recent, jnp.asarray(window), RATE, CAP)
  want = collections.defaultdict(
    dict, {k: dict(v) for k, v in count(corpus).items()}
  )
  for (a, b, c), weight in learned(windows_of(text, stride), size).items():
    want[a, b][c] = min(want[a, b].get(c, 0) + weight, CAP)
  close(lookups(table, recent), want)


def test_a_context_that_is_no_text_knows_nothing():
  """Empty places, too, hold -1."""
  recent = update(Recent.empty(SIZE), jnp.asarray([-1, -1, 2, 3]), RATE, CAP)
  table = TrigramTable.build([[1, 2, 3, 4]])
  for context in [(-1, -1), (-1, 2), (2, -1)]:
    _, weight = follow(table, recent, jnp.asarray(context), CAP)
    assert not weight.any()
  assert recent.seen == 0


def best_first(found, context, nodes, depth):
  """Paths by falling probability, from a heap."""
  heap, chosen = [(-1.0, (), context)], {}
  while heap and len(chosen) < nodes:
    odds, path, last = heapq.heappop(heap)
    chosen[path] = -odds
    weights = found.get(last, {}) if len(path) < depth else {}
    for token, weight in weights.items():
      p = -odds * weight / (sum(weights.values()) + RATE)
      heapq.heappush(heap, (-p, (*path, token), (last[1], token)))
  return chosen


def paths(tokens, parent):
  """Every node as its tokens from the root on."""
  tokens, parent = np.asarray(tokens), np.asarray(parent)
  names = {0: ()}
  for n in range(1, len(parent)):
    if parent[n] != ABSENT:
      assert parent[n] < n, "parents come first"
      names[n] = (*names[parent[n]], int(tokens[n]))
  assert len(set(names.values())) == len(names), "a path twice"
  return set(names.values())


@pytest.mark.parametrize("nodes, depth", [(2, 1), (7, 3), (40, 2)])
def test_tree_is_the_best_first_search(nodes, depth):
  rng = np.random.default_rng(nodes)
  corpus = [rng.choice(V, 60, p=[0.4, 0.3, 0.15, 0.1, 0.05]) for _ in range(3)]
  text, recent = rng.integers(0, V, 20), Recent.empty(SIZE)
  for window in windows_of(text):
    recent = update(recent, jnp.asarray(window), RATE, CAP)
  table = TrigramTable.build(corpus, successors=K)
  found = lookups(table, recent)

  def grow(context):
    follow = lambda c: successors(table, recent, c, CAP)
    return likeliest(follow, context, RATE, nodes, depth)

  contexts = [(a, b) for a in range(V) for b in range(V)] + [(-1, 3)]
  trees = jax.jit(jax.vmap(grow))(jnp.asarray(contexts))
  for i, context in enumerate(contexts):
    tokens, parent = trees.tokens[i], trees.parent[i]
    got = paths(tokens, parent)
    want = best_first(found, context, nodes, depth)
    every = best_first(found, context, 10_000, depth)
    assert tokens[0] == context[1] and parent[0] == -1
    assert len(got) == len(want)
    least = min(want.values()) * (1 - 1e-5)  # of equals, any
    assert all(every[path] >= least for path in got)
  assert depths(trees).max() == min(depth, nodes - 1)


BAD = {
  "no successors": (lambda: TrigramTable.build([], successors=0), "at least 1"),
  "negative": (
    lambda: TrigramTable.build([[1, -1, 2]]),
    r"in 0\.\.2097151; got -1\.\.2",
  ),
  "too large": (lambda: TrigramTable.build([[1, 2**21, 2]]), "got 1..2097152"),
  "long window": (
    lambda: Recent.empty(3).update(jnp.arange(6), RATE, CAP),
    "window of 6 tokens has 4 tri-grams, more than the 3",
  ),
}


@pytest.mark.parametrize("call, words", BAD.values(), ids=BAD)
def test_refused(call, words):
  with pytest.raises(ValueError, match=words):
    call()
