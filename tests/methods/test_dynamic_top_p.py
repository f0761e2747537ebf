# SPDX-License-Identifier: Apache-2.0
"""Law: a token runs the fewest experts that hold a share p of its router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.methods.experts import TopPRouter
from adaptivejax.nn import adjust
from tests.methods.mixtures import (
  KEY,
  LIVE,
  D,
  E,
  X,
  brute_force,
  call,
  gates_of,
  mixture,
  probabilities,
  set_gate,
)


def rule(p, share):
  """By hand, token by token: gates [*N, E]."""
  gates = np.zeros_like(p)
  for index in np.ndindex(p.shape[:-1]):
    total = 0.0
    for e in np.argsort(-p[index], kind="stable"):
      gates[index][e] = p[index][e]
      total += p[index][e]
      if total >= share:
        break
  return gates


@pytest.mark.parametrize("p", [0.0, 0.2, 0.4, 0.7, 0.95])
def test_takes_the_fewest_that_hold_the_share(p):
  moe = mixture(TopPRouter, p=0.4)
  gates = rule(probabilities(moe.router.gate, X), p)
  y, cost, signals = call(adjust(moe, 0.4 - p), X)
  want = brute_force(moe.experts, X, gates)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  counts = (gates > 0).sum(-1)
  np.testing.assert_array_equal(signals.choices[0], counts)
  assert cost.items == counts.sum()
  assert (p == 0) == (counts == 1).all()
  if 0.2 < p < 0.95:
    assert len(np.unique(counts)) > 2, "tokens differ in what they need"


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_the_whole_share_is_the_dense_mixture(p):
  moe = mixture(TopPRouter, p=p)
  want = brute_force(moe.experts, X, probabilities(moe.router.gate, X))
  y, cost, _ = call(moe, X)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  assert cost.items == E * X[..., 0].size


def test_an_undecided_router_asks_for_more():
  router = mixture(TopPRouter, p=0.6).router
  kernel = router.gate.kernel.get_value()
  counts = [
    (gates_of(set_gate(router, sure * kernel)(X)) > 0).sum(-1).mean()
    for sure in (0.0, 0.3, 1.0, 3.0, 100.0)
  ]
  assert counts == sorted(counts, reverse=True)
  assert counts[0] == 5 and counts[-1] < 1.1  # 5 of 8 hold .6


@pytest.mark.parametrize("live", [None, LIVE], ids=["all", "some"])
def test_the_penalty_is_balance_and_entropy(live):
  router = mixture(TopPRouter, p=0.5, balance=0.3, entropy=0.2).router
  rows = np.ones(X.shape[:2], bool) if live is None else np.asarray(live)
  p = probabilities(router.gate, X)[rows]
  used = (rule(p, 0.5) > 0).mean(0)
  want = 0.3 * E * (used * p.mean(0)).sum()
  want -= 0.2 * (p * np.log(p)).sum(-1).mean()
  np.testing.assert_allclose(router(X, live, KEY).penalty, want, rtol=1e-5)


def test_the_entropy_makes_routers_decided():
  """A flat router runs all it may; the penalty alone makes it choose."""
  router = mixture(TopPRouter, p=0.6, balance=0.0, entropy=1.0).router
  kernel = 0.1 * router.gate.kernel.get_value()

  @jax.jit
  def step(kernel):
    slope = jax.grad(lambda k: set_gate(router, k)(X).penalty)(kernel)
    return kernel - slope

  used = lambda k: (gates_of(set_gate(router, k)(X)) > 0).sum(-1).mean()
  before = used(kernel)
  for _ in range(30):
    kernel = step(kernel)
  assert before > 4 and used(kernel) < 2


def test_refuses_a_share_that_is_nan():
  with pytest.raises(ValueError, match="`p` is NaN"):
    TopPRouter(D, E, p=float("nan"), rngs=nnx.Rngs(0))


def test_certainty_is_one_expert_and_no_nan():
  """Probabilities that are exactly 0 have no entropy."""
  router = mixture(TopPRouter, p=0.9).router
  kernel = jnp.zeros((D, E)).at[0, 3].set(1e4)
  x = X.at[..., 0].set(1)
  loss = lambda k: set_gate(router, k)(x, None, KEY).penalty
  value, slope = jax.value_and_grad(loss)(kernel)
  assert np.isfinite(value) and np.isfinite(slope).all()
  assert ((gates_of(set_gate(router, kernel)(x)) > 0).sum(-1) == 1).all()
