# SPDX-License-Identifier: Apache-2.0
"""`attend_blocks` against dense attention, its twin, and counted work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax import core
from adaptivejax.core.sparse_attention import (
  attend_blocks,
  attend_blocks_dense,
  attend_visible,
)

B, T, S, H, G, D = 2, 21, 30, 4, 2, 8
SIZES = {"block_q": 8, "block_kv": 8}


def given(seed=0):
  rng = np.random.default_rng(seed)
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  pos = np.stack([rng.permutation(S) for _ in range(B)])
  pos = np.where(rng.random((B, S)) < 0.2, -1, pos)
  keys = core.Keys(
    make(B, G, S, D), make(B, G, S, D), jnp.asarray(pos)[:, None]
  )
  at = np.stack([rng.permutation(S)[:T] for _ in range(B)])
  return make(B, T, H, D), keys, jnp.asarray(at)


def some_lists(seed=1, heads=G):
  mask = np.random.default_rng(seed).random((B, heads, 3, 4)) < 0.5
  return core.lists_from_mask(jnp.asarray(mask), **SIZES)


@pytest.mark.parametrize("window", [None, 7])
def test_full_lists_are_dense_attention(window):
  q, keys, at = given()
  lists = core.full_lists(T, S, **SIZES)

  def sparse(q, k, v):
    given = core.Keys(k, v, keys.pos)
    return attend_blocks(q, given, lists, at, window=window)[0].out

  def dense(q, k, v):
    return core.attend(q, core.Keys(k, v, keys.pos), at, window=window)

  loss = lambda f: lambda *a: (jnp.sin(f(*a)).sum(), f(*a))
  run = lambda f: jax.jit(jax.grad(loss(f), (0, 1, 2), has_aux=True))(
    q, keys.k, keys.v
  )
  for got, want in zip(*map(jax.tree.leaves, (run(sparse), run(dense)))):
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_twin_agrees_in_all():
  q, keys, at = given()
  rng = np.random.default_rng(2)
  segments = (
    jnp.asarray(rng.integers(0, 2, (B, T))),
    jnp.asarray(rng.integers(0, 2, (B, S))),
  )
  keys = keys._replace(pos=jnp.concatenate([keys.pos, keys.pos[..., ::-1]], 1))
  more = {
    "window": 20,
    "segments": segments,
    "bias": jnp.asarray(rng.normal(size=(B, G, S)), jnp.float32),
    "sinks": jnp.arange(H) / 2,
    "softcap": 2.0,
    "scale": 0.3,
    "mass": True,
  }
  static = {
    name: more.pop(name) for name in ("window", "softcap", "scale", "mass")
  }

  @jax.jit
  def both(**more):
    args = (q, keys, some_lists(), at)
    dense = attend_blocks_dense(*args, **more, **static)
    return attend_blocks(*args, **more, **static), dense

  (got, cost), (want, price) = both(**more)
  assert got.out.shape == (B, T, H, D) and got.lse.shape == (B, T, H)
  assert got.mass.shape == (B, H, 3, 4)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert cost == price
  free, _ = attend_blocks(q, keys, some_lists(), at, causal=False)
  assert np.abs(free.out - got.out).max() > 0.1


def test_nan_is_seen_as_dense_attention_sees_it():
  q, keys, at = given()
  keys = keys._replace(
    k=keys.k.at[0, 0, 3].set(jnp.nan), v=keys.v.at[1, 1, 4].set(jnp.inf)
  )
  lists = core.full_lists(T, S, **SIZES)
  got, _ = attend_blocks(q, keys, lists, at)
  want = core.attend(q, keys, at)
  assert np.isnan(want).any() and not np.isnan(want).all()
  np.testing.assert_allclose(got.out, want, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 8, T])
def test_all_that_is_visible_is_dense_attention(tokens):
  """Heads hold other keys; some queries and keys are none; NaN where unseen."""
  q, keys, _ = given()
  pos = np.sort(np.random.default_rng(4).integers(-9, S, (B, G, S)))
  pos = jnp.asarray(np.maximum(pos, -1))
  at = jnp.asarray([range(T), range(9, 9 + T)]).at[1, -2:].set(-1)[:, :tokens]
  unseen = ((pos < 0) | (pos > at.max(1)[:, None, None]))[..., None]
  spoilt = lambda a: jnp.where(unseen, jnp.nan, a)
  keys = core.Keys(spoilt(keys.k), spoilt(keys.v), pos)
  got, cost = attend_visible(q[:, :tokens], keys, at, **SIZES)
  want = core.attend(q[:, :tokens], keys, at)
  assert np.isfinite(want).all()
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert cost.full == B * H * tokens * S * 4 * D
  assert (cost.spent < cost.full) == (tokens >= 8)


def test_the_cost_is_that_of_the_listed_pairs():
  q, keys, at = given()
  mask = np.random.default_rng(3).random((1, H, 3, 4)) < 0.5
  lists = core.lists_from_mask(jnp.asarray(mask), **SIZES)
  _, cost = attend_blocks(q, keys, lists, at)
  pairs = sum(
    min(8, T - 8 * tile) * min(8, S - 8 * block)
    for _, _, tile, block in zip(*np.nonzero(mask))
  )
  assert cost.spent == B * pairs * 4 * D
  assert cost.full == B * H * T * S * 4 * D
  assert cost.items == cost.capacity == B * mask.sum()
  _, whole = attend_blocks(q, keys, core.full_lists(T, S, **SIZES), at)
  assert whole.spent == whole.full and whole.share == 1
