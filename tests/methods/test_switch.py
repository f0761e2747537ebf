# SPDX-License-Identifier: Apache-2.0
"""Law: a token runs its best expert, if that has room; transformers agrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.router_losses import load_balance, router_z
from adaptivejax.methods.experts import SwitchRouter
from adaptivejax.nn import adjust
from tests.methods.mixtures import (
  KEY,
  LIVE,
  B,
  D,
  E,
  T,
  X,
  assert_golden,
  brute_force,
  call,
  golden,
  golden_mixture,
  mixture,
  probabilities,
  set_gate,
)


@pytest.mark.parametrize("block", ["switch", "switch_drops"])
def test_equals_transformers(block):
  moe, g = golden_mixture(block, SwitchRouter)
  moe = adjust(moe, 1 - float(g.capacity) / T)
  routing = moe.router(jnp.asarray(g.x))
  np.testing.assert_array_equal(routing.experts, g.experts)
  served = g.experts >= 0
  np.testing.assert_allclose(
    np.asarray(routing.weights)[served], g.weights[served], rtol=1e-5
  )
  assert routing.dropped == (~served).sum()
  assert_golden(moe, g)


def test_losses_equal_those_of_transformers():
  """Whose balance is that of each sequence, then the mean."""
  g = golden("switch")
  p = jax.nn.softmax(g.logits)
  each = jax.vmap(load_balance)(p, jnp.asarray(g.experts))
  np.testing.assert_allclose(each.mean(), g.balance, rtol=1e-5)
  np.testing.assert_allclose(router_z(jnp.asarray(g.logits)), g.z, rtol=1e-5)


def rule(p, capacity, live=None):
  """By hand: gates [B, T, E], and the tokens that found no room."""
  gates, lost = np.zeros_like(p), 0
  for b in range(len(p)):
    taken = np.zeros(E, int)
    for t in range(p.shape[1]):
      e = p[b, t].argmax()
      if live is not None and not live[b, t]:
        continue
      if taken[e] < capacity:
        gates[b, t, e], taken[e] = p[b, t, e], taken[e] + 1
      else:
        lost += 1
  return gates, lost


@pytest.mark.parametrize("capacity", [0, 1, 2, T])
@pytest.mark.parametrize("live", [None, LIVE], ids=["all", "some"])
def test_an_expert_takes_the_first_tokens_of_a_sequence(capacity, live):
  moe = adjust(mixture(SwitchRouter), 1 - capacity / T)
  gates, lost = rule(probabilities(moe.router.gate, X), capacity, live)
  y, cost, _ = call(moe, X, live)
  want = brute_force(moe.experts, X, gates)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  assert cost.dropped == lost and cost.items == (gates > 0).sum()


@pytest.mark.parametrize("factor", [0.5, 1.25, 8.0])
def test_training_has_the_capacity_of_its_factor(factor):
  moe = mixture(SwitchRouter, capacity_factor=factor, jitter=0.0)
  gates, lost = rule(
    probabilities(moe.router.gate, X), int(np.ceil(factor * T / E))
  )
  y, cost, signals = call(moe, X, None, KEY)
  want = brute_force(moe.experts, X, gates)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  assert cost.dropped == lost and (lost > 0) == (factor < 8)
  np.testing.assert_array_equal(signals.load[0], (gates > 0).sum((0, 1)))


def test_a_whole_capacity_is_not_rounded_up():
  router = SwitchRouter(D, 8, capacity_factor=0.56, rngs=nnx.Rngs(0))
  assert 0.56 * 100 / 8 > 7 == router.capacity(100, True)
  assert router.capacity(101, True) == 8


def test_later_tokens_take_no_room_from_earlier_ones():
  moe = adjust(mixture(SwitchRouter), 0.8)
  y = call(moe, X)[0]
  changed = call(moe, X.at[:, 6:].multiply(-1))[0]
  np.testing.assert_allclose(y[:, :6], changed[:, :6], rtol=1e-5, atol=1e-6)
  assert not np.allclose(y[:, 6:], changed[:, 6:], atol=1e-3)


def test_noise_moves_the_choice_and_not_the_input():
  """Published code multiplies the input of the experts too."""
  loud = mixture(SwitchRouter, jitter=0.9, capacity_factor=E)
  quiet = mixture(SwitchRouter, jitter=0.0, capacity_factor=E)
  noisy, still = loud.router(X, None, KEY), quiet.router(X, None, KEY)
  assert np.any(np.asarray(noisy.experts) != np.asarray(still.experts))
  alone = mixture(SwitchRouter, 1, jitter=0.9)
  np.testing.assert_allclose(
    call(alone, X, None, KEY)[0], call(alone, X)[0], rtol=1e-5, atol=1e-6
  )
  small = mixture(SwitchRouter, jitter=1e-3, capacity_factor=E)
  other = small.router(X, None, KEY).weights
  np.testing.assert_allclose(other, still.weights, rtol=2e-2)
  assert np.any(np.asarray(other) != np.asarray(still.weights))


def test_noise_fills_its_interval():
  router = mixture(SwitchRouter, jitter=0.3, capacity_factor=E).router
  router = set_gate(router, jnp.zeros((D, E)).at[0, 0].set(1.0))
  p = router(jnp.ones((20, 50, D)), None, KEY).weights[..., 0]
  noise = np.log((E - 1) * p / (1 - p))  # the only logit that is not 0
  assert 0.7 <= noise.min() < 0.71 and 1.29 < noise.max() <= 1.3
  np.testing.assert_allclose(noise.mean(), 1, atol=0.02)


@pytest.mark.parametrize("live", [None, LIVE], ids=["all", "some"])
def test_the_penalty_is_balance_and_z(live):
  """Of the tokens that want an expert, whether it has room or not."""
  moe = mixture(SwitchRouter, jitter=0.0, balance=0.3, z=0.2)
  rows = np.ones((B, T), bool) if live is None else np.asarray(live)
  p = probabilities(moe.router.gate, X)[rows]
  logits = np.asarray(moe.router.gate(X), np.float64)[rows]
  used = np.bincount(p.argmax(-1), minlength=E) / len(p)
  balance = E * (used * p.mean(0)).sum()
  z = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
  got = moe.router(X, live, KEY).penalty
  np.testing.assert_allclose(got, 0.3 * balance + 0.2 * z, rtol=1e-4)


@pytest.mark.parametrize("factor", [0, -1.0, float("nan")])
def test_refuses_experts_without_room(factor):
  with pytest.raises(ValueError, match="capacity_factor"):
    SwitchRouter(D, E, capacity_factor=factor, rngs=nnx.Rngs(0))
