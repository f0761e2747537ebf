# SPDX-License-Identifier: Apache-2.0
"""Law: what is kept is kept whole, what is given up is gone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.attention import Keys, attend
from adaptivejax.core.cache import (
  KVCache,
  append,
  commit_path,
  crop,
  leave_empty,
  share_from,
)
from adaptivejax.core.eviction import (
  best,
  candidates,
  compacted_positions,
  evict,
  merge,
  replace_victim,
  victim,
)
from adaptivejax.core.quantise import dequantise, quantise

B, G, N, W, L, S = 2, 2, 7, 4, 2, 4


def keys(seed=0, pos=None, many=N):
  k, v = jax.random.normal(jax.random.key(seed), (2, B, G, many, W))
  pos = np.tile(np.arange(many), (B, G, 1)) if pos is None else pos
  return Keys(k, v, jnp.asarray(pos, jnp.int32))


@pytest.mark.parametrize("per_head", [True, False])
def test_replacing_is_a_dictionary_that_forgets_its_least(per_head):
  """Protected tokens stay; a row that reads nothing keeps all."""
  cache = KVCache.empty(L, B, G, S, W, per_head=per_head, evicts=True)
  heads = G if per_head else 1
  rng, worth = np.random.default_rng(0), {}
  held = [[{} for _ in range(heads)] for _ in range(B)]
  run = jax.jit(replace_victim)
  score = np.zeros((B, heads, S), np.float32)
  for t in range(12):
    reads = np.array([True, t % 3 > 0])
    place = np.where(reads, t, -1)[:, None, None]
    new = keys(t, np.broadcast_to(place, (B, 1, 1)), many=1)
    guard = np.asarray(cache.pos[:, 1]) == 2
    cache, slot = run(cache, jnp.int32(1), new, jnp.asarray(score), guard)
    for b, h in np.ndindex(B, heads):
      mine = held[b][h]
      if not reads[b]:
        assert slot[b, h] == S
        continue
      if len(mine) == S:
        least = min((j for j in mine if j != 2), key=lambda j: worth[b, h, j])
        del mine[least]
      mine[t] = new
      worth[b, h, t] = rng.normal()
      score[b, h, slot[b, h]] = worth[b, h, t]
    for b, g in np.ndindex(B, G):
      mine, h = held[b][g if per_head else 0], g if per_head else 0
      pos = np.asarray(cache.pos[b, 1, h])
      assert sorted(pos[pos >= 0]) == sorted(mine)
      for s in np.flatnonzero(pos >= 0):
        one = mine[int(pos[s])]
        np.testing.assert_array_equal(cache.k[b, 1, g, s], one.k[b, g, 0])
        np.testing.assert_array_equal(cache.v[b, 1, g, s], one.v[b, g, 0])
  assert not np.any(cache.k[:, 0]) and (cache.pos[:, 0] == -1).all()


def test_the_victim_is_empty_or_least_and_the_first_of_equals():
  pos = jnp.array([[[3, -1, 5, -1], [3, 4, 5, 6], [3, 4, 5, 6]]])
  score = jnp.array([[[0, 9, 0, 9], [7, 2, 2, 8], [7, 2, 2, 8]]])
  guard = jnp.array([[[False] * 4, [False] * 4, [False, True, True, True]]])
  np.testing.assert_array_equal(victim(pos, score, guard), [[1, 1, 0]])
  np.testing.assert_array_equal(victim(pos, score), [[1, 1, 1]])


@pytest.mark.parametrize("slots", [3, N, N + 2])
def test_the_best_are_those_of_a_sort(slots):
  priority = np.random.default_rng(0).integers(0, 4, (B, G, N)).astype("f4")
  priority[1, :, 2] = -np.inf
  for count in (0, 2, 5, [1, 6]):
    index = jax.jit(best, static_argnums=2)(
      jnp.asarray(priority), jnp.asarray(count), slots
    )
    most = np.broadcast_to(count, B)
    for b, g in np.ndindex(B, G):
      order = sorted(range(N), key=lambda n: (-priority[b, g, n], n))
      order = [n for n in order if priority[b, g, n] > -np.inf]
      want = sorted(order[: min(most[b], slots)])
      want = want + [N] * (slots - len(want))
      np.testing.assert_array_equal(index[b, g], want)


@pytest.mark.parametrize("coded", [False, True])
def test_evicting_keeps_whole_keys_and_nothing_of_the_others(coded):
  """Bias and scales go along; a NaN that is given up is gone."""
  dtype = jnp.int8 if coded else jnp.float32
  cache = KVCache.empty(L, B, G, S, W, dtype, per_head=True, merges=True)
  cache = append(cache, 1, keys(1, np.full((B, 1, 2), [[0, 1]]), many=2))
  new = keys(2, np.broadcast_to([2, 3, -1, 4], (B, 1, 4)), many=4)
  new = new._replace(
    k=new.k.at[:, :, 2].set(jnp.nan),
    bias=jnp.broadcast_to(jnp.array([0.1, 0.2, 0.3, 0.4]), (B, G, 4)),
  )
  both = candidates(cache.read(jnp.int32(1)), new)
  assert both.k.shape[2] == S + 4 and both.k.dtype == dtype
  index = jnp.array([[[1, 5, 8], [0, 4, 7]]] * B)  # 8 is none
  kept = jax.jit(evict)(both, index)
  np.testing.assert_array_equal(kept.pos[0], [[1, 3, -1], [0, 2, 4]])
  np.testing.assert_allclose(kept.bias[1], [[0, 0.2, 0], [0, 0.1, 0.4]])
  assert np.isfinite(kept.k).all() and not np.any(kept.k[:, 0, 2])
  np.testing.assert_array_equal(kept.k[0, 1, 0], cache.k[0, 1, 1, 0])
  if coded:
    v, scale = dequantise(kept.v[:, 1, 1], kept.scale[1][:, 1, 1]), 0.02
    np.testing.assert_allclose(v, new.v[:, 1, 0], atol=scale)
  else:
    np.testing.assert_array_equal(kept.v[:, 0, 1], new.v[:, 0, 1])


def brute_merge(held, classes, count, weight):
  k, v = np.zeros((2, B, G, count, W))
  pos, size = np.full((B, G, count), -1), np.zeros((B, G, count))
  norm = np.zeros((B, G, count))
  for b, g, c in np.ndindex(B, G, count):
    own = [
      n for n in range(N) if classes[b, g, n] == c and held.pos[b, g, n] >= 0
    ]
    if own:
      w = np.asarray(weight[b, g, own]) / np.sum(weight[b, g, own])
      k[b, g, c] = w @ held.k[b, g, own]
      v[b, g, c] = w @ held.v[b, g, own]
      norm[b, g, c] = w @ np.linalg.norm(held.k[b, g, own], axis=-1)
      pos[b, g, c] = held.pos[b, g, own].max()
      size[b, g, c] = np.exp(held.bias[b, g, own]).sum()
  return k, v, pos, size, norm


@pytest.mark.parametrize("keep_norm", [False, True])
def test_merging_is_the_weighted_mean_of_each_class(keep_norm):
  rng = np.random.default_rng(0)
  held = keys()
  held = held._replace(
    pos=held.pos.at[0, 0, 3].set(-1),
    bias=jnp.asarray(rng.normal(size=(B, G, N)), jnp.float32),
  )
  classes = rng.integers(-1, 4, (B, G, N))
  weight = rng.uniform(0.1, 1, (B, G, N)).astype(np.float32)
  k, v, pos, size, norm = brute_merge(held, classes, 5, weight)
  bad = jnp.asarray((classes < 0) | (np.asarray(held.pos) < 0))[..., None]
  poisoned = held._replace(
    k=jnp.where(bad, jnp.nan, held.k), v=jnp.where(bad, jnp.nan, held.v)
  )
  merged = jax.jit(merge, static_argnums=2, static_argnames="keep_norm")(
    poisoned, jnp.asarray(classes), 5, weight=weight, keep_norm=keep_norm
  )
  if keep_norm:
    length = np.linalg.norm(k, axis=-1)
    k = k * (norm / np.where(length > 0, length, 1))[..., None]
  np.testing.assert_allclose(merged.k, k, atol=1e-5)
  np.testing.assert_allclose(merged.v, v, atol=1e-5)
  np.testing.assert_array_equal(merged.pos, pos)
  some = pos >= 0
  np.testing.assert_allclose(np.exp(merged.bias)[some], size[some], rtol=1e-5)


def test_equal_keys_merge_exactly():
  """By their log-size attention counts one key as those it stands for."""
  three = keys(many=3)
  copies = np.array([0, 1, 0, 2, 0, 2, 1])
  held = Keys(three.k[:, :, copies], three.v[:, :, copies], keys().pos)
  q = jax.random.normal(jax.random.key(3), (B, 1, 4, W))
  at = jnp.full((B, 1), N)
  classes = jnp.broadcast_to(jnp.asarray(copies), (B, G, N))
  merged = merge(held, classes, 4)
  want = attend(q, held, at)
  np.testing.assert_allclose(attend(q, merged, at), want, atol=1e-5)
  twice = merge(merged, jnp.broadcast_to(jnp.array([0, 1, 2, 0]), (B, G, 4)), 3)
  np.testing.assert_allclose(attend(q, twice, at), want, atol=1e-5)
  plain = attend(q, merge(held, classes, 4, log_size=False), at)
  assert np.abs(plain - want).max() > 1e-2


def test_positions_are_compacted_to_ranks():
  pos = jnp.array([[[9, -1, 2, 40, 0, -1]]])
  np.testing.assert_array_equal(
    compacted_positions(pos), [[[2, -1, 1, 3, 0, -1]]]
  )


def test_eight_bits_are_off_by_half_a_unit_at_most():
  x = 10 ** jnp.linspace(-3, 3, 50)[:, None] * jax.random.normal(
    jax.random.key(0), (50, W)
  )
  codes, scale = quantise(x)
  assert codes.dtype == jnp.int8 and np.abs(codes).max() == 127
  error = np.abs(dequantise(codes, scale) - x)
  assert (error <= 0.5001 * np.asarray(scale)[:, None]).all()
  largest = np.abs(x).argmax(1)
  np.testing.assert_allclose(error[np.arange(50), largest], 0, atol=1e-4)
  zeros = quantise(jnp.zeros((2, W)))
  assert not np.any(zeros[0]) and not np.any(zeros[1])
  assert not np.isfinite(quantise(x.at[3, 1].set(jnp.nan))[1][3])


def test_a_coded_cache_reads_nearly_what_was_written():
  """Also after holes, a path committed, and a crop."""
  tree = keys(5, np.broadcast_to(np.arange(6), (B, 1, 6)), many=6)
  path, count = jnp.array([[0, 2, 4], [0, 1, 3]]), jnp.array([3, 2])
  read = []
  for dtype in (jnp.float32, jnp.int8):
    cache = KVCache.empty(L, B, G, S + 2, W, dtype, merges=True)
    for layer in range(L):
      cache = append(cache, layer, tree)
    cache = append(cache, 1, share_from(jnp.array([1, 1]))(1, cache))
    cache = commit_path(cache, path, count)
    cache = crop(cache, jnp.array([2, 2]))
    q = jax.random.normal(jax.random.key(3), (B, 1, 4, W))
    read.append(attend(q, cache.read(1), jnp.full((B, 1), 5)))
    hole = append(cache, 0, leave_empty()(0, cache))
    assert (hole.pos[:, 0, 0, 2] == -1).all()
  np.testing.assert_allclose(read[1], read[0], atol=0.03)
  assert np.abs(read[1] - read[0]).max() > 0


def test_a_cache_that_evicts_is_never_full_and_takes_nothing_back():
  cache = KVCache.empty(L, B, G, S, W, evicts=True).advance(99)
  assert not cache.full(50).any()
  for call in (
    lambda: append(cache, 0, keys(many=1)),
    lambda: crop(cache, jnp.array([1, 1])),
    lambda: commit_path(cache, jnp.zeros((B, 1), int), jnp.ones(B, int)),
  ):
    with pytest.raises(ValueError, match=r"does not keep every key.*policy"):
      call()
