# SPDX-License-Identifier: Apache-2.0
"""Law: a cache holds what was appended, where it was, and nothing else."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.attention import Keys
from adaptivejax.core.cache import (
  KVCache,
  append,
  kv_propagate,
  leave_empty,
  share_from,
)
from adaptivejax.models import DecoderConfig, DecoderLM

L, B, H, S, W = 3, 2, 2, 6, 4


def keys(seed, pos):
  k, v = jax.random.normal(jax.random.key(seed), (2, B, H, len(pos[0]), W))
  return Keys(k, v, jnp.asarray(pos, jnp.int32))


class Notebook:
  """The same by dictionary: (layer, row, position) -> (key, value)."""

  def __init__(self):
    self.held = {}

  def write(self, layer, new, slots=None):
    for b, t in np.ndindex(*new.pos.shape):
      p = int(new.pos[b, t])
      if p >= 0:
        self.held[layer, b, p] = new.k[b, :, t], new.v[b, :, t]

  def check(self, cache):
    seen = set()
    for l, b, s in np.ndindex(L, B, S):
      p = int(cache.pos[l, b, s])
      if p < 0:
        assert not np.any(cache.k[l, b, :, s]), "an empty slot holds zeros"
        continue
      seen.add((l, b, p))
      k, v = self.held[l, b, p]
      np.testing.assert_array_equal(cache.k[l, b, :, s], k)
      np.testing.assert_array_equal(cache.v[l, b, :, s], v)
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


def test_a_full_cache_is_a_sliding_window():
  cache = KVCache.empty(L, B, H, S, W)
  for t in range(S + 3):
    cache = append(cache, 0, keys(t, np.asarray(cache.positions(1)))).advance(1)
  held = sorted(np.asarray(cache.pos[0, 0]))
  assert held == list(range(3, S + 3))


def test_policies_fill_only_skipped_layers():
  start = jnp.array([1, 3], jnp.int32)
  cache = KVCache.empty(L, B, H, S, W)
  for l in range(L):
    cache = append(cache, l, keys(l, [[0], [0]]))
  project = lambda layer, cache: keys(9, [[0], [0]])
  got = {
    "project": kv_propagate(cache, start, project),
    "share": kv_propagate(cache, start, share_from(start)),
    "empty": kv_propagate(cache, start, leave_empty()),
  }
  for out in got.values():  # row 1 skipped nothing, row 0 kept layer 0
    np.testing.assert_array_equal(out.k[:, 1], cache.k[:, 1])
    np.testing.assert_array_equal(out.k[0], cache.k[0])
  for l in (1, 2):
    np.testing.assert_array_equal(
      got["project"].k[l, 0, :, 0], project(l, cache).k[0, :, 0]
    )
    np.testing.assert_array_equal(
      got["share"].v[l, 0, :, 0], cache.v[0, 0, :, 0]
    )
  np.testing.assert_array_equal(got["empty"].pos[1:, 0, 0], -1)
  assert not np.any(got["empty"].k[1:, 0, :, 0])


def test_take_keeps_the_layers_asked_for():
  cache = append(KVCache.empty(L, B, H, S, W), 2, keys(0, [[0], [0]]))
  kept = cache.take(jnp.array([0, 2]))
  assert kept.k.shape[0] == 2
  np.testing.assert_array_equal(kept.k[1], cache.k[2])


def test_a_step_does_not_copy_the_cache():
  """Decoding updates in place: no copy of cache size inside the loop."""
  config = DecoderConfig(
    vocab=11, layers=4, features=16, hidden=16, heads=2, kv_heads=2
  )
  model = DecoderLM(config, rngs=nnx.Rngs(0))
  cache = model.empty_cache(2, 96)

  def steps(model, token, cache):
    def body(carry, _):
      token, cache = carry
      out = model(token, cache)
      return (out.logits.argmax(-1).astype(jnp.int32), out.cache), None

    return jax.lax.scan(body, (token, cache), None, length=5)[0]

  token = jnp.zeros((2, 1), jnp.int32)
  text = jax.jit(steps).lower(model, token, cache).compile().as_text()
  shape = ",".join(map(str, cache.k.shape))
  copies = re.findall(rf"f32\[{shape}\]\S* copy\(", text)
  assert len(copies) <= 2, "at most the two on the way in, outside the loops"


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
