# SPDX-License-Identifier: Apache-2.0
"""Law: groups, then experts, by biased scores; transformers' V3 agrees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import special

from adaptivejax.methods.experts import DeepSeekRouter
from adaptivejax.nn import MixtureOfExperts, Mlp, adjust
from tests.methods.mixtures import (
  KEY,
  LIVE,
  B,
  D,
  E,
  F,
  T,
  X,
  assert_golden,
  best_of,
  brute_force,
  call,
  copy,
  gates_of,
  golden,
  golden_mixture,
  logits,
  mixture,
  probabilities,
  run_expert,
  set_gate,
  with_weights,
)


def with_bias(router, bias):
  router = copy(router)
  router.load_bias.set_value(jnp.asarray(bias, jnp.float32))
  return router


@functools.cache
def of_golden():
  moe, g = golden_mixture(
    "deepseek", DeepSeekRouter, top_k=3, groups=4, kept_groups=2
  )
  router = with_bias(moe.router, g.bias)
  shared = Mlp(D, 2 * F, gated=True, activation=jax.nn.silu, rngs=nnx.Rngs(0))
  shared = with_weights(shared, vars(g), "shared_")
  return MixtureOfExperts(router, moe.experts, shared)


def test_equals_transformers():
  g, moe = golden("deepseek"), of_golden()
  routing = moe.router(jnp.asarray(g.x))
  np.testing.assert_array_equal(routing.experts, g.experts)
  np.testing.assert_allclose(routing.weights, g.weights, rtol=1e-5)
  assert_golden(moe, g)


def scores_of(router, x):
  return special.expit(logits(router.gate, x))


def rule(scores, bias, k, groups, kept, scale):
  """By hand, token by token: gates [*N, E]."""
  gates, size = np.zeros_like(scores), E // groups
  for index in np.ndindex(scores.shape[:-1]):
    s = scores[index]
    biased = (s + bias).reshape(groups, size)
    two = np.sort(biased, -1)[:, -2:].sum(-1)
    good = best_of(two, kept)
    allowed = [e for e in range(E) if e // size in good]
    chosen = sorted(allowed, key=lambda e: -(s + bias)[e])[:k]
    gates[index][chosen] = scale * s[chosen] / (s[chosen].sum() or 1)
  return gates


@pytest.mark.parametrize(
  ("k", "groups", "kept"), [(3, 1, 1), (3, 4, 2), (4, 2, 1), (2, 8, 3)]
)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_decides_by_groups_and_bias(k, groups, kept, seed):
  router = mixture(
    DeepSeekRouter, top_k=k, groups=groups, kept_groups=kept, scale=1.5
  ).router
  rng = np.random.default_rng(seed)
  bias = np.zeros(E) if seed is None else rng.normal(size=E) * 0.3
  gates = rule(scores_of(router, X), bias, k, groups, kept, 1.5)
  got = gates_of(with_bias(router, bias)(X))
  np.testing.assert_allclose(got, gates, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("k", "groups", "kept"), [(3, 1, 1), (3, 4, 2)])
def test_version_2_is_softmax_without_a_bias(k, groups, kept):
  """Groups by their best expert; weights are scaled and nothing else."""
  settings = {"top_k": k, "groups": groups, "kept_groups": kept, "scale": 16.0}
  router = mixture(DeepSeekRouter, softmax=True, **settings).router
  p, want = probabilities(router.gate, X), np.zeros((B, T, E))
  for index in np.ndindex(B, T):
    best = p[index].reshape(groups, -1).max(-1)
    allowed = np.repeat(best >= np.sort(best)[-kept], E // groups)
    chosen = best_of(np.where(allowed, p[index], -1), k)
    want[index][chosen] = 16 * p[index][chosen]
  np.testing.assert_allclose(gates_of(router(X)), want, rtol=1e-4, atol=1e-6)
  used, share = (want > 0).mean(1), p.mean(1)
  each = E * (used * share).sum(-1) / k
  np.testing.assert_allclose(router(X).penalty, 1e-4 * each.mean(), rtol=1e-4)
  assert router.load_bias is None


@pytest.mark.parametrize("fewer", [0, 2, 3])
def test_shared_experts_always_run(fewer):
  moe = of_golden()
  router, x = moe.router, jnp.asarray(golden("deepseek").x)
  bias = np.asarray(router.load_bias.get_value())
  gates = rule(scores_of(router, x), bias, 3, 4, 2, 2.5)
  chosen = best_of(np.where(gates > 0, scores_of(router, x) + bias, -9), 3)
  np.put_along_axis(gates, chosen[..., 3 - fewer :], 0, -1)
  total = gates.sum(-1, keepdims=True)
  gates = 2.5 * gates / np.where(total > 0, total, 1)
  rows = np.asarray(x, np.float64)
  want = brute_force(moe.experts, x, gates) + run_expert(moe.shared, None, rows)
  y, cost, _ = call(adjust(moe, float(fewer)), x)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  assert cost.items == (3 - fewer) * B * T + B * T  # and the shared one
  np.testing.assert_allclose(cost.full, 6.0 * D * F * B * T * (E + 2))


def test_the_bias_chooses_and_does_not_weigh():
  router = mixture(DeepSeekRouter, top_k=3).router
  gates = gates_of(with_bias(router, np.zeros(E))(X))
  same = gates_of(with_bias(router, np.full(E, 7.0))(X))
  np.testing.assert_allclose(same, gates, rtol=1e-5)
  favoured = gates_of(with_bias(router, 9.0 * (np.arange(E) == 4))(X))
  assert (favoured[..., 4] > 0).all() and (gates[..., 4] == 0).any()
  scores = scores_of(router, X)
  share = scores[..., 4] / np.where(favoured > 0, scores, 0).sum(-1)
  np.testing.assert_allclose(favoured[..., 4], 2.5 * share, rtol=1e-4)


@pytest.mark.parametrize("live", [None, LIVE], ids=["all", "some"])
def test_the_gradient_of_the_bias_is_its_excess_load(live):
  moe = mixture(DeepSeekRouter, top_k=3, balance=0.0)

  def task(moe):
    return jnp.sin(moe(X, live, KEY)[0]).sum()

  def penalty(moe):
    return moe.router(X, live, KEY).penalty

  slope = jax.jit(jax.grad(task))(moe).router
  assert not np.any(slope.load_bias.get_value())
  assert np.any(slope.gate.kernel.get_value())
  value, slope = jax.value_and_grad(penalty)(moe)
  assert value == 0
  count = (gates_of(moe.router(X, live)) > 0).sum((0, 1))
  items = B * T if live is None else live.sum()
  want = (count - count.mean()) / items
  np.testing.assert_allclose(
    slope.router.load_bias.get_value(), want, atol=1e-6
  )
  slope.router.load_bias.set_value(jnp.zeros(E))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))


def test_sign_descent_on_the_bias_balances_the_load():
  """A skewed router, 2000 updates as published: the spread of loads falls."""
  x = jax.random.normal(jax.random.key(1), (512, D)).at[:, 0].set(1)
  router = mixture(DeepSeekRouter, top_k=2, balance=0.0).router
  kernel = router.gate.kernel.get_value() * 0.5
  router = set_gate(router, kernel.at[0].set(jnp.linspace(-1.5, 1.5, E)))
  rule = optax.sign_sgd(1e-3)

  @jax.jit
  def train(bias):
    def step(bias, _):
      loss = lambda b: _with(router, b)(x, None, KEY).penalty
      update, _ = rule.update(jax.grad(loss)(bias), rule.init(bias))
      return optax.apply_updates(bias, update), None

    return jax.lax.scan(step, bias, None, 2000)[0]

  def spread(bias):
    load = (gates_of(with_bias(router, bias)(x)) > 0).sum(0)
    return load.std() / load.mean()

  assert spread(np.zeros(E)) > 0.5
  assert spread(train(jnp.zeros(E))) < 0.1


def _with(router, bias):
  router = copy(router)
  router.load_bias.set_value(bias)
  return router


@pytest.mark.parametrize("live", [None, LIVE], ids=["all", "some"])
def test_the_sequence_wise_loss(live):
  router = mixture(DeepSeekRouter, top_k=3, balance=0.7).router
  gates, scores = gates_of(router(X, live)), scores_of(router, X)
  share = scores / scores.sum(-1, keepdims=True)
  rows = np.ones((B, T), bool) if live is None else np.asarray(live)
  each = [
    (E / 3 * (gates[b, rows[b]] > 0).mean(0) * share[b, rows[b]].mean(0)).sum()
    for b in range(B)
  ]
  got = router(X, live, KEY).penalty
  np.testing.assert_allclose(got, 0.7 * np.mean(each), rtol=1e-5)


def test_scores_that_vanish_are_not_nan():
  router = mixture(DeepSeekRouter, top_k=3).router
  router = set_gate(router, jnp.zeros((D, E)).at[0].set(-1e4))
  routing = router(X.at[..., 0].set(1), None, KEY)
  assert not np.any(routing.weights) and np.isfinite(routing.penalty)


@pytest.mark.parametrize(
  ("settings", "match"),
  [
    ({"groups": 3}, "groups"),
    ({"groups": 0}, "groups"),
    ({"groups": 4, "kept_groups": 5}, "kept_groups"),
    ({"groups": 4, "kept_groups": 0}, "kept_groups"),
    ({"groups": 4, "kept_groups": 2, "top_k": 5}, "5 different choices"),
    ({"top_k": 9}, "9 different choices"),
  ],
)
def test_refuses_groups_that_do_not_fit(settings, match):
  with pytest.raises(ValueError, match=match):
    DeepSeekRouter(D, E, rngs=nnx.Rngs(0), **settings)
