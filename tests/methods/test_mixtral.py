# SPDX-License-Identifier: Apache-2.0
"""Law: the K best experts by softmax; transformers' Mixtral and Qwen3 agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.router_losses import load_balance
from adaptivejax.methods.experts import MixtralRouter
from adaptivejax.nn import adjust
from tests.methods.mixtures import (
  KEY,
  LIVE,
  D,
  E,
  X,
  assert_golden,
  best_of,
  brute_force,
  call,
  gates_of,
  golden_mixture,
  mixture,
  only_best,
  probabilities,
  set_gate,
)

SETTINGS = {
  "mixtral": {"top_k": 2},
  "qwen3": {"top_k": 3, "renormalised": False},
}


@pytest.mark.parametrize("block", SETTINGS)
def test_equals_transformers(block):
  moe, g = golden_mixture(block, MixtralRouter, **SETTINGS[block])
  routing = moe.router(jnp.asarray(g.x))
  np.testing.assert_array_equal(routing.experts, g.experts)
  np.testing.assert_allclose(routing.weights, g.weights, rtol=1e-5)
  balance = load_balance(jax.nn.softmax(g.logits), jnp.asarray(g.experts))
  np.testing.assert_allclose(balance, g.balance, rtol=1e-5)
  np.testing.assert_allclose(routing.penalty, 0.001 * g.balance, rtol=1e-5)
  assert_golden(moe, g)


def rule(p, k, renormalised):
  """By hand: gates [*N, E]."""
  gates = only_best(p, k)
  return gates / gates.sum(-1, keepdims=True) if renormalised and k else gates


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("fewer", range(4))
def test_fewer_choices_are_as_if_k_had_been_smaller(fewer, renormalised):
  moe = mixture(MixtralRouter, top_k=3, renormalised=renormalised)
  p = probabilities(moe.router.gate, X)
  gates = rule(p, 3 - fewer, renormalised)
  y, cost, _ = call(adjust(moe, float(fewer)), X)
  want = brute_force(moe.experts, X, gates)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  assert cost.items == (3 - fewer) * X[..., 0].size


def test_no_more_than_k_can_be_left_out():
  y, cost, _ = call(adjust(mixture(MixtralRouter, top_k=3), 99.0), X)
  assert not np.any(y) and cost.items == 0


def test_ties_go_to_the_lower_expert():
  router = mixture(MixtralRouter).router
  routing = set_gate(router, jnp.zeros((D, E)))(X)
  assert np.all(np.asarray(routing.experts) == [0, 1])
  np.testing.assert_allclose(routing.weights, 0.5)


@pytest.mark.parametrize("live", [None, LIVE], ids=["all", "some"])
def test_the_penalty_is_that_of_switch_transformer(live):
  router = mixture(MixtralRouter, top_k=3, balance=0.5).router
  rows = np.ones(X.shape[:2], bool) if live is None else np.asarray(live)
  p = probabilities(router.gate, X)[rows]
  used = np.bincount(best_of(p, 3).reshape(-1), minlength=E) / len(p)
  want = 0.5 * E * (used * p.mean(0)).sum()
  routing = router(X, live, KEY)
  np.testing.assert_allclose(routing.penalty, want, rtol=1e-5)
  assert not gates_of(routing)[~rows].any()


def test_the_penalty_spreads_the_load():
  router = mixture(MixtralRouter, top_k=2, balance=1.0).router
  kernel = router.gate.kernel.get_value()
  x = X.at[..., 0].set(1)

  @jax.jit
  def step(kernel):
    slope = jax.grad(lambda k: set_gate(router, k)(x).penalty)(kernel)
    return kernel - 0.3 * slope

  def loads(kernel):
    gates = gates_of(set_gate(router, kernel)(x))
    return (gates > 0).sum((0, 1))

  kernel = kernel.at[0, :2].set(4.0)  # two favourites
  assert loads(kernel).max() == x[..., 0].size
  for _ in range(200):
    kernel = step(kernel)
  assert loads(kernel).max() <= 0.5 * x[..., 0].size
