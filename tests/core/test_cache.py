# SPDX-License-Identifier: Apache-2.0
"""Law: a cache holds what was appended, where it was, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.attention import Keys
from adaptivejax.core.cache import (
  KVCache,
  append,
  commit_path,
  crop,
  kv_propagate,
  leave_empty,
  share_from,
)

L, B, H, S, W = 3, 2, 2, 6, 4


def keys(seed, pos):
  k, v = jax.random.normal(jax.random.key(seed), (2, B, H, len(pos[0]), W))
  return Keys(k, v, jnp.asarray(pos, jnp.int32)[:, None])


class Notebook:
  """The same by dictionary: (layer, row, position) -> (key, value)."""

  def __init__(self):
    self.held = {}

  def write(self, layer, new, slots=None):
    for b, t in np.ndindex(*new.pos[:, 0].shape):
      p = int(new.pos[b, 0, t])
      if p >= 0:
        self.held[layer, b, p] = new.k[b, :, t], new.v[b, :, t]

  def check(self, cache):
    seen = set()
    for l, b, s in np.ndindex(L, B, S):
      p = int(cache.pos[b, l, 0, s])
      if p < 0:
        assert not np.any(cache.k[b, l, :, s]), "an empty slot holds zeros"
        continue
      seen.add((l, b, p))
      k, v = self.held[l, b, p]
      np.testing.assert_array_equal(cache.k[b, l, :, s], k)
      np.testing.assert_array_equal(cache.v[b, l, :, s], v)
    assert seen == set(self.held)


def test_rows_of_different_length_and_holes():
  cache = KVCache.empty(L, B, H, S, W)
  cache = cache._replace(length=jnp.array([0, 2], jnp.int32))
  book = Notebook()
  first = keys(0, [[0, 1, -1], [2, -1, 4]])  # -1: no key at this layer
  cache = jax.jit(append)(cache, jnp.int32(1), first)
  book.write(1, first)
  cache = cache.advance(3)
  np.testing.assert_array_equal(cache.length, [3, 5])
  second = keys(1, np.asarray(cache.positions(1)))
  cache = append(cache, 1, second, rows=jnp.array([True, False]))
  book.write(1, jax.tree.map(lambda a: a[:1], second))
  book.check(cache)


def test_nan_without_a_position_is_not_written():
  bad = keys(0, [[0, -1], [0, 1]])
  bad = bad._replace(k=bad.k.at[0, :, 1].set(jnp.nan))
  cache = append(KVCache.empty(L, B, H, S, W), 0, bad)
  assert np.isfinite(cache.k).all()


def test_a_full_cache_says_so_and_loses_nothing():
  cache = KVCache.empty(L, B, H, S, W)
  for t in range(S + 3):
    np.testing.assert_array_equal(cache.full(), t >= S)
    np.testing.assert_array_equal(cache.full(2), t >= S - 1)
    cache = append(cache, 0, keys(t, np.asarray(cache.positions(1)))).advance(1)
  np.testing.assert_array_equal(cache.pos[0, 0, 0], np.arange(S))
  np.testing.assert_array_equal(
    cache.k[:, 0, :, 0], keys(0, [[0], [0]]).k[:, :, 0]
  )


def test_cropped_tokens_are_gone_in_every_layer():
  cache = KVCache.empty(L, B, H, S, W)
  for layer in range(L):
    cache = append(cache, layer, keys(layer, [[0, 1, 2], [0, 1, 2]]))
  cut = crop(cache.advance(3), jnp.array([1, 3], jnp.int32))
  np.testing.assert_array_equal(cut.length, [1, 3])
  np.testing.assert_array_equal(cut.pos[0, :, 0], [[0, -1, -1, -1, -1, -1]] * L)
  np.testing.assert_array_equal(cut.pos[1, :, 0], [[0, 1, 2, -1, -1, -1]] * L)


def test_a_committed_path_is_what_appending_it_gives():
  """Tree 0 - (1 - 3, 2 - 4): row 0 keeps 0, 2, 4; row 1 only the root."""
  past = KVCache.empty(L, B, H, 9, W).advance(jnp.array([1, 2], jnp.int32))
  depth = jnp.array([0, 1, 1, 2, 2])
  nodes = jnp.array([[0, 2, 4], [0, 1, 3]])
  count = jnp.array([3, 1])
  got, want = past, past
  rows = jnp.arange(B)[:, None]
  pick = lambda a: jnp.moveaxis(a[rows, :, nodes], 1, 2)
  for layer in range(L):
    tree = keys(layer, np.asarray(past.length)[:, None] + np.asarray(depth))
    got = append(got, layer, tree)
    here = jnp.where(
      jnp.arange(3) < count[:, None], tree.pos[rows, 0, nodes], -1
    )
    here = here[:, None]
    want = append(want, layer, Keys(pick(tree.k), pick(tree.v), here))
  got, want = jax.jit(commit_path)(got, nodes, count), want.advance(count)
  held = (want.pos >= 0)[..., None]
  np.testing.assert_array_equal(got.pos, want.pos)
  np.testing.assert_array_equal(got.length, want.length)
  np.testing.assert_array_equal(jnp.where(held, got.k, 0), want.k)
  np.testing.assert_array_equal(jnp.where(held, got.v, 0), want.v)


def test_policies_fill_only_skipped_layers():
  start = jnp.array([1, 3], jnp.int32)
  cache = KVCache.empty(L, B, H, S, W)
  for l in range(L):
    cache = append(cache, l, keys(l, [[0], [0]]))
  projected = keys(9, [[0], [0]])
  project = lambda layer, cache: projected
  got = {
    "project": kv_propagate(cache, start, project),
    "share": kv_propagate(cache, start, share_from(start)),
    "empty": kv_propagate(cache, start, leave_empty()),
  }
  for out in got.values():  # row 1 skipped nothing, row 0 kept layer 0
    np.testing.assert_array_equal(out.k[1], cache.k[1])
    np.testing.assert_array_equal(out.k[:, 0], cache.k[:, 0])
  for l in (1, 2):
    np.testing.assert_array_equal(
      got["project"].k[0, l, :, 0], projected.k[0, :, 0]
    )
    np.testing.assert_array_equal(
      got["share"].v[0, l, :, 0], cache.v[0, 0, :, 0]
    )
  np.testing.assert_array_equal(got["empty"].pos[0, 1:, 0, 0], -1)
  assert not np.any(got["empty"].k[0, 1:, :, 0])


def test_take_keeps_the_layers_asked_for():
  cache = append(KVCache.empty(L, B, H, S, W), 2, keys(0, [[0], [0]]))
  kept = cache.take(jnp.array([0, 2]))
  assert kept.layers == 2
  np.testing.assert_array_equal(kept.k[:, 1], cache.k[:, 2])


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: KVCache.empty(0, 1, 1, 1, 1), "at least one"),
    (
      lambda: append(
        KVCache.empty(L, B, H, 1, W), 0, keys(0, [[0, 1], [0, 1]])
      ),
      "do not fit",
    ),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
