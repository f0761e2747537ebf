# SPDX-License-Identifier: Apache-2.0
"""Law: a batch of calls is one call of more items, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.covers import coins
from adaptivejax.core.dispatch import NOBODY, dispatch
from adaptivejax.core.expert_folding import fold_plans
from adaptivejax.core.experts import expert_apply, expert_apply_dense

B, N, K, E, D = 3, 20, 2, 4, 3
KEYS = jax.random.split(jax.random.key(0), 3)
W = jax.random.normal(KEYS[0], (E, D, D))
X = jax.random.normal(KEYS[1], (B, N, D))
WEIGHTS = jax.random.normal(KEYS[2], (B, N, K))
RNG = np.random.default_rng(0)
ROUTES = np.stack([
  np.stack([RNG.permutation(E)[:K] for _ in range(N)]) for _ in range(B)
])  # fmt: skip
ROUTES[RNG.random(ROUTES.shape) < 0.3] = NOBODY
ROUTES[1] = NOBODY
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def routed(x, weights, w, route, apply=expert_apply, cover=None):
  plan = dispatch(jnp.asarray(route), weights, E)
  f = lambda rows, w: jnp.tanh(rows @ w)
  return apply(f, x, plan, w, cover=cover)


def loss(x, weights, w, route, **how):
  return jnp.sin(routed(x, weights, w, route, **how)[0]).sum()


def total(x, weights, w, **how):
  each = functools.partial(loss, **how)
  return jax.vmap(each, (0, 0, None, 0))(
    x, weights, w, jnp.asarray(ROUTES)
  ).sum()


def dense(x, weights, w):
  each = functools.partial(loss, apply=expert_apply_dense)
  return sum(each(*args) for args in zip(x, weights, [w] * B, ROUTES))


@pytest.mark.parametrize("cover", [None, coins(8)])
def test_the_gradient_of_a_batch_folds(cover):
  """No loop over examples, and no gradient of parameters for each."""
  grad = jax.grad(functools.partial(total, cover=cover), argnums=(0, 1, 2))
  got = jax.jit(grad)(X, WEIGHTS, W)
  wanted = jax.jit(jax.grad(dense, argnums=(0, 1, 2)))(X, WEIGHTS, W)
  jax.tree.map(close, got, wanted)
  text = str(jax.make_jaxpr(grad)(X, WEIGHTS, W))
  assert "scan[" not in text
  assert f"f32[{B},{E},{D},{D}]" not in text


def test_a_gradient_for_each_example():
  each = jax.vmap(jax.grad(loss, argnums=(0, 2)), (0, 0, None, 0))
  dx, dw = jax.jit(each)(X, WEIGHTS, W, jnp.asarray(ROUTES))
  one = jax.jit(
    jax.grad(functools.partial(loss, apply=expert_apply_dense), (0, 2))
  )
  for b in range(B):
    wanted = one(X[b], WEIGHTS[b], W, ROUTES[b])
    jax.tree.map(close, (dx[b], dw[b]), wanted)
  assert not dw[1].any()


def test_the_chunks_grow_with_the_batch():
  """60 rows of one expert are fewer chunks than thrice 20."""
  one = jnp.zeros((256, 8, 1), int)
  x, weights = jnp.ones((256, 8, D)), jnp.ones((256, 8, 1))
  run = lambda cover: jax.make_jaxpr(
    jax.vmap(lambda x, weights, one: routed(x, weights, W, one, cover=cover)[0])
  )(x, weights, one)
  assert f"f32[512,{D}]" in str(run(None))
  assert f"f32[512,{D}]" not in str(run(coins(8)))


def test_inside_a_scan_of_remat_layers_and_batched_twice():
  def deep(x, w):
    layer = lambda x: jax.vmap(
      lambda x, weights, route: jnp.sin(routed(x, weights, w, route)[0])
    )(x, WEIGHTS, jnp.asarray(ROUTES))
    step = jax.checkpoint(lambda x, _: (layer(x), None))
    return jax.lax.scan(step, x, length=2)[0].sum()

  def plain(x, w):
    for _ in range(2):
      x = jnp.stack([
        jnp.sin(routed(*a, apply=expert_apply_dense)[0])
        for a in zip(x, WEIGHTS, [w] * B, ROUTES)
      ])  # fmt: skip
    return x.sum()

  both = jnp.stack([X, 2 * X])
  many = lambda f: lambda w: sum(f(x, w) for x in both)
  batch = lambda w: jax.vmap(deep, (0, None))(both, w).sum()
  got, wanted = (jax.jit(jax.grad(f))(W) for f in (batch, many(plain)))
  close(got, wanted)


@pytest.mark.parametrize("most", [None, N])
def test_folded_plans(most):
  """Each choice of each example has its slot, and `place` says which."""
  make = lambda route, weights: dispatch(route, weights, E, most=most)
  route = np.where(np.arange(K) == 0, ROUTES, NOBODY)  # N choices at most
  plans = jax.vmap(make)(jnp.asarray(route), WEIGHTS)
  plan = fold_plans(plans, N)
  flat = route.reshape(B * N, K)
  whole = dispatch(jnp.asarray(flat), WEIGHTS.reshape(B * N, K), E)
  used = int((route >= 0).sum())
  assert np.array_equal(plan.sizes, whole.sizes)
  assert np.array_equal(plan.item[:used], whole.item[:used])
  assert np.array_equal(plan.weight[:used], whole.weight[:used])
  theirs = flat >= 0
  assert np.array_equal(plan.place < used, theirs)
  assert np.array_equal(plan.place[theirs], np.asarray(whole.place)[theirs])
