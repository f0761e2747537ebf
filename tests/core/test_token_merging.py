# SPDX-License-Identifier: Apache-2.0
"""Law: tokens merge as a brute force over pairs says, and are found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivejax.core.rungs import default_rungs, on_all, on_rung
from adaptivejax.core.token_merging import (
  Match,
  Tokens,
  bipartite_match,
  keep_all,
  keep_only,
  merge_best,
  merge_similar,
  most_merges,
  restore,
  settle,
  settle_masked,
  settle_slots,
)

B, N, D = 3, 11, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, N, D)).astype(np.float32)
LIVE = np.arange(N) < np.array([11, 8, 1])[:, None]


def brute(metric, live, protected):
  """`{(row, source): (cosine, partner)}`."""
  found = {}
  for b in range(len(metric)):
    for i in range(protected + protected % 2, metric.shape[1], 2):
      for j in range(1, metric.shape[1], 2):
        if j < protected or not (live[b, i] and live[b, j]):
          continue
        u, v = metric[b, i].astype(float), metric[b, j].astype(float)
        cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        if (b, i) not in found or cosine > found[b, i][0]:
          found[b, i] = cosine, j
  return found


@pytest.mark.parametrize("protected", [0, 1, 2, 3])
def test_the_partner_is_the_most_similar(protected):
  match = bipartite_match(
    jnp.asarray(X), jnp.asarray(LIVE), protected=protected
  )
  want = brute(X, LIVE, protected)
  for b in range(B):
    for s in range((N + 1) // 2):
      if (b, 2 * s) not in want:
        assert match.similarity[b, s] == -jnp.inf
        continue
      cosine, partner = want[b, 2 * s]
      np.testing.assert_allclose(match.similarity[b, s], cosine, atol=1e-5)
      assert match.partner[b, s] == partner
  most = max(sum(b == row for row, _ in want) for b in range(B))
  assert most_merges(N, protected=protected) == most


@pytest.mark.parametrize("merges", [0, 1, 3, 5])
def test_the_best_pairs_merge(merges):
  match = bipartite_match(jnp.asarray(X), jnp.asarray(LIVE), protected=1)
  into = np.asarray(merge_best(match, merges, N))
  want = np.tile(np.arange(N), (B, 1))
  found = brute(X, LIVE, 1)
  for b in range(B):
    ranked = sorted(
      (i for r, i in found if r == b), key=lambda i: -found[b, i][0]
    )
    for i in ranked[:merges]:
      want[b, i] = found[b, i][1]
  np.testing.assert_array_equal(into, want)


def test_pairs_above_a_cosine_merge():
  match = bipartite_match(jnp.asarray(X), jnp.asarray(LIVE), protected=1)
  found = brute(X, LIVE, 1)
  for level in (-2.0, 0.3, 0.6, 1.1):
    into = np.asarray(merge_similar(match, level, N))
    want = np.tile(np.arange(N), (B, 1))
    for (b, i), (cosine, j) in found.items():
      want[b, i] = j if cosine > level else i
    np.testing.assert_array_equal(into, want)


def test_ties_go_to_the_lower_slot():
  same = jnp.ones((1, 6, 2))
  match = bipartite_match(same, jnp.ones((1, 6), bool), protected=0)
  np.testing.assert_array_equal(match.partner, [[1, 1, 1]])
  np.testing.assert_array_equal(merge_best(match, 2, 6), [[1, 1, 1, 3, 4, 5]])


def means(x, size, weight, into, live):
  """`(tokens, sizes, members)` of one row."""
  slots = sorted({i for i, on in zip(into, live) if on and i >= 0})
  groups = [
    [t for t in range(len(x)) if live[t] and into[t] == s] for s in slots
  ]
  rows = [
    x[g[0]] if len(g) == 1 else np.average(x[g], axis=0, weights=weight[g])
    for g in groups
  ]
  return rows, [size[g].sum() for g in groups], groups


@jax.jit
def settled(x, live, size, into, weight):
  tokens = Tokens.start(x, live, remember=True)._replace(size=size)
  got = settle(tokens, into, weight)
  return got, restore(got, got.x, got.left)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_settling_takes_weighted_means(seed):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(B, N, D)).astype(np.float32)
  live = np.arange(N) < rng.integers(0, N + 1, B)[:, None]
  size = np.where(live, rng.integers(1, 5, (B, N)), 0).astype(np.float32)
  weight = rng.random((B, N)).astype(np.float32) + 0.1
  into = np.tile(np.arange(N), (B, 1))
  for b in range(B):  # some go to one that stays, some nowhere
    stay = rng.random(N) < 0.6
    stay[0] = True
    goal = np.flatnonzero(stay & live[b])
    for t in np.flatnonzero(~stay & live[b]):
      into[b, t] = rng.choice(goal) if rng.random() < 0.7 else -1
  for how in (size, weight):
    given = None if how is size else weight
    got, back = jax.tree.map(
      np.asarray, settled(x, live, size, into.astype(np.int32), given)
    )
    for b in range(B):
      rows, sizes, groups = means(x[b], size[b], how[b], into[b], live[b])
      assert (got.size[b] > 0).sum() == len(rows)
      if rows:
        np.testing.assert_allclose(got.x[b, : len(rows)], rows, atol=1e-5)
      np.testing.assert_allclose(got.size[b, : len(rows)], sizes)
      assert not np.any(got.x[b, len(rows) :])
      for slot, group in enumerate(groups):
        np.testing.assert_array_equal(got.origin[b, group], slot)
        for t in group:
          np.testing.assert_array_equal(back[b, t], got.x[b, slot])
        if len(group) == 1:
          np.testing.assert_array_equal(back[b, group[0]], x[b, group[0]])
      gone = live[b] & (into[b] < 0)
      np.testing.assert_array_equal(got.origin[b, gone], -1)
      np.testing.assert_array_equal(back[b, gone], x[b, gone])


def test_no_merge_is_the_identity_bit_by_bit():
  tokens = Tokens.start(jnp.asarray(X))
  got = settle(tokens, keep_all(tokens.live))
  jax.tree.map(np.testing.assert_array_equal, got, tokens)


def test_sizes_add_up_to_all_tokens():
  tokens = Tokens.start(jnp.asarray(X), jnp.asarray(LIVE))
  for _ in range(4):
    match = bipartite_match(tokens.x, tokens.live)
    tokens = settle(tokens, merge_similar(match, -2.0, N))
  np.testing.assert_array_equal(tokens.size.sum(1), LIVE.sum(1))
  np.testing.assert_array_equal(tokens.lengths, [1, 1, 1])
  means = np.stack([X[b, LIVE[b]].mean(0) for b in range(B)])
  np.testing.assert_allclose(tokens.x[:, 0], means, atol=1e-6)


def test_a_known_count_is_cut_to():
  tokens = Tokens.start(jnp.asarray(X), jnp.asarray(LIVE))
  match = bipartite_match(tokens.x, tokens.live)
  into = merge_best(match, 4, N)
  got, want = settle(tokens, into, count=N - 4), settle_masked(tokens, into)
  assert got.x.shape == (B, N - 4, D)
  np.testing.assert_array_equal(got.x, want.x[:, : N - 4])
  assert not np.any(want.size[:, N - 4 :])
  np.testing.assert_array_equal(restore(got, got.x), restore(want, want.x))


@pytest.mark.parametrize("fuse", [False, True])
def test_kept_tokens_stay_and_the_rest_is_one_or_none(fuse):
  keep = np.zeros((B, N), bool)
  keep[:, [0, 4, 9]] = True
  into = keep_only(jnp.asarray(keep), jnp.asarray(LIVE), fuse=fuse)
  for b in range(B):
    rest = [t for t in range(N) if LIVE[b, t] and not keep[b, t]]
    for t in range(N):
      want = t if keep[b, t] and LIVE[b, t] else -1
      if t in rest and fuse:
        want = rest[0]
      assert into[b, t] == want


def test_a_nan_merges_last_and_only_with_its_partner():
  x = jnp.asarray(X[:1]).at[0, 4].set(jnp.nan)
  tokens = Tokens.start(x)
  match = bipartite_match(x, tokens.live)
  others = settle(tokens, merge_best(match, 5, N))
  bad = np.isnan(np.asarray(others.x)).any(-1)
  assert bad.sum() == 1 and others.origin[0, 4] == np.flatnonzero(bad[0])[0]
  worst = settle(tokens, merge_best(match, 6, N))
  assert np.isnan(np.asarray(worst.x)).any(-1).sum() == 1


def test_dead_tokens_reach_nothing():
  bad = jnp.where(LIVE[..., None], X, jnp.nan)

  def total(x):
    tokens = Tokens.start(x, jnp.asarray(LIVE))
    match = bipartite_match(tokens.x, tokens.live)
    tokens = settle(tokens, merge_best(match, 3, N))
    return jnp.sin(restore(tokens, tokens.x)).sum()

  for f in (total, jax.grad(total)):
    np.testing.assert_array_equal(f(bad), f(jnp.asarray(X)))


def test_gradients_are_those_of_the_mean():
  tokens = Tokens.start(jnp.asarray(X[:1]))
  into = jnp.asarray([[0, 1, 1, 1, 4, 5, 6, 7, -1, 9, 10]], jnp.int32)

  def first(x):
    return settle(tokens._replace(x=x), into).x[0, 1].sum()

  slope = jax.grad(first)(tokens.x)
  want = np.zeros((1, N, D))
  want[0, 1:4] = 1 / 3
  np.testing.assert_allclose(slope, want, atol=1e-6)


def test_one_token_has_no_partner():
  match = bipartite_match(jnp.ones((2, 1, 3)), jnp.ones((2, 1), bool))
  assert isinstance(match, Match)
  np.testing.assert_array_equal(merge_similar(match, -2.0, 1), [[0], [0]])


def test_rungs_are_eighths():
  assert default_rungs(257) == (40, 72, 104, 136, 168, 200, 232, 257)
  assert default_rungs(5) == (5,)


@pytest.mark.parametrize("counts", [(0, 0), (3, 1), (4, 2), (5, 9), (9, 9)])
def test_work_is_done_on_the_smallest_rung(counts):
  x = jnp.asarray(RNG.normal(size=(2, 9, D)), jnp.float32)
  ran = lambda x, w: (jnp.tanh(x) * w, jnp.float32(x.shape[1]))
  count, w = jnp.asarray(counts), jnp.float32(2)
  run = jax.jit(lambda count: on_rung(ran, x, count, w, rungs=(2, 4, 9)))
  y, length = run(count)
  want = min(r for r in (2, 4, 9) if r >= max(counts))
  assert length == want
  full, _ = on_all(ran, x, count, w)
  np.testing.assert_allclose(y[:, :want], full[:, :want], atol=1e-6)
  assert not np.any(y[:, want:])


def test_under_vmap_each_example_has_its_rung():
  x = jnp.ones((3, 2, 8, D))
  counts = jnp.asarray([[1, 2], [8, 1], [4, 4]])
  ran = lambda x: (x, jnp.float32(x.shape[1]))
  _, length = jax.vmap(lambda x, n: on_rung(ran, x, n, rungs=(2, 4, 8)))(
    x, counts
  )
  np.testing.assert_array_equal(length, [2, 8, 4])


@pytest.mark.parametrize("rungs", [(), (2, 4), (4, 2, 8), (2, 2, 8)])
def test_rungs_that_do_not_fit_are_refused(rungs):
  x = jnp.ones((1, 8, 1))
  with pytest.raises(ValueError, match="ascend to the 8 slots"):
    on_rung(lambda x: (x, 0), x, jnp.asarray([3]), rungs=rungs)


def test_a_slot_that_nobody_weighs_has_no_gradient():
  """0 / 0 behind a `where` would be NaN in the derivative."""
  into = jnp.array([[-1, 1, 2]])  # the first is given up
  x, size = jnp.ones((1, 3, 2)), jnp.ones((1, 3))

  def total(weight):
    return settle_slots(x, size, into, weight)[0].sum()

  slope = jax.grad(total)(jnp.array([[0.2, 0.3, 0.5]]))
  assert np.isfinite(slope).all()
