# SPDX-License-Identifier: Apache-2.0
"""Law: a query sees the keys whose position is in 0..its own, nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.attention import Keys, attend, rotary

B, T, S, H, W = 2, 3, 7, 4, 6


def brute(q, k, v, pos, positions):
  """Query by query, head by head."""
  share, out = q.shape[2] // k.shape[1], np.zeros(q.shape)
  for b, t, h in np.ndindex(*q.shape[:3]):
    seen = [s for s in range(S) if 0 <= pos[b, s] <= positions[b, t]]
    if seen:
      scores = k[b, h // share, seen] @ q[b, t, h] / np.sqrt(W)
      odds = np.exp(scores - scores.max())
      out[b, t, h] = odds / odds.sum() @ v[b, h // share, seen]
  return out


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_brute_force_over_unordered_slots(groups):
  rng = np.random.default_rng(groups)
  q = rng.normal(size=(B, T, H, W)).astype(np.float32)
  k, v = rng.normal(size=(2, B, groups, S, W)).astype(np.float32)
  pos = np.stack([rng.permutation(S), rng.permutation(S)]) - 2
  pos = np.maximum(pos, -1).astype(np.int32)
  positions = np.array([[0, 2, 4], [-1, 1, 3]], np.int32)  # -1 sees nothing
  keys = Keys(jnp.asarray(k), jnp.asarray(v), jnp.asarray(pos)[:, None])
  got = jax.jit(attend)(jnp.asarray(q), keys, jnp.asarray(positions))
  want = brute(q, k, v, pos, positions)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert not np.any(got[1, 0])


def test_a_query_without_keys_has_no_gradient():
  keys = Keys(*jnp.ones((2, 1, 1, S, W)), jnp.full((1, 1, S), -1))
  read = lambda q: attend(q, keys, jnp.zeros((1, 1), jnp.int32)).sum()
  value, grad = jax.value_and_grad(read)(jnp.ones((1, 1, 1, W)))
  assert value == 0
  np.testing.assert_array_equal(grad, 0)


def test_a_key_that_nobody_sees_may_be_nan():
  """Empty slots, and slots of positions yet to come."""
  pos = jnp.array([[[0, -1, 1, 7]]])
  bad = jnp.array([False, True, False, True])[:, None]
  k, v = jax.random.normal(jax.random.key(0), (2, 1, 1, 4, W))
  q = jax.random.normal(jax.random.key(1), (1, 2, 1, W))

  def read(q, k, v):
    return (attend(q, Keys(k, v, pos), jnp.array([[1, 2]])) ** 2).sum()

  poisoned = jnp.where(bad, jnp.nan, k), jnp.where(bad, jnp.nan, v)
  got = jax.value_and_grad(read, argnums=(0, 1, 2))(q, *poisoned)
  want = jax.value_and_grad(read, argnums=(0, 1, 2))(q, k, v)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_window_hides_what_is_further_back():
  keys = Keys(
    *jax.random.normal(jax.random.key(0), (2, 1, 1, 4, W)),
    jnp.arange(4)[None, None],
  )
  q = jax.random.normal(jax.random.key(1), (1, 1, 1, W))
  near = jax.tree.map(lambda a: a[..., 2:, :], (keys.k, keys.v))
  at = jnp.array([[3]])
  np.testing.assert_allclose(
    attend(q, keys, at, window=2),
    attend(q, Keys(*near, jnp.array([[[2, 3]]])), at),
    rtol=1e-5,
    atol=1e-6,
  )


def test_rotary_scores_depend_on_the_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, W))
  at = lambda x, p: rotary(x, jnp.full((1, 1), p))
  score = lambda i, j: float((at(q, i) * at(k, j)).sum())
  np.testing.assert_allclose(score(9, 4), score(5, 0), rtol=1e-5)
  assert abs(score(9, 4) - score(9, 0)) > 1e-3


def test_a_broken_key_breaks_those_who_see_it_and_nobody_else():
  """Of several queries, each sees another part of the keys."""
  q = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
  k, v = jax.random.normal(jax.random.key(1), (2, 1, 1, 4, 8))
  at = jnp.arange(4)[None]
  mask = jnp.tril(jnp.ones((1, 4, 4), bool)).at[0, 3, 2].set(False)

  def out(q, k, v):
    return attend(q, Keys(k, v, at[None]), at, mask=mask)

  want = out(q, k, v)
  for broken in (
    (k.at[0, 0, 2, 1].set(jnp.nan), v),
    (k, v.at[0, 0, 2].set(jnp.inf)),
  ):
    got = out(q, *broken)
    others = np.array([0, 1, 3])
    np.testing.assert_array_equal(got[:, others], want[:, others])
    assert jnp.isnan(got[:, 2]).all()
    seen = lambda q, k, v: out(q, k, v)[:, np.array([0, 1, 3])].sum()
    grads = jax.grad(seen, (0, 1, 2))(q, *broken)
    assert all(jnp.isfinite(g).all() for g in grads)
