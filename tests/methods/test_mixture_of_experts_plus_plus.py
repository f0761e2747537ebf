# SPDX-License-Identifier: Apache-2.0
"""Law: zero, copy and constant experts cost no rows; LongCat-Flash agrees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special

from adaptivejax.methods.experts import MoEPlusPlus
from adaptivejax.nn import ZeroComputationExperts, adjust
from tests.methods.host import shaken
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
  experts,
  gates_of,
  golden,
  golden_experts,
  logits,
  only_best,
  probabilities,
  set_gate,
)

N, KINDS = 4, (1, 2, 2)
ALL = N + sum(KINDS)


@functools.cache
def plus_plus(top_k=3, count=N, kinds=KINDS, **settings):
  moe = MoEPlusPlus(
    experts(count), D, top_k=top_k, kinds=kinds, rngs=nnx.Rngs(1), **settings
  )
  return shaken(moe)


@functools.cache
def of_golden():
  g = golden("longcat")
  moe = MoEPlusPlus(
    golden_experts(g),
    D,
    top_k=3,
    kinds=(0, 3, 0),
    scale=6.0,
    active=2.0,
    rngs=nnx.Rngs(0),
  )
  moe = set_gate(moe, g.router)
  moe.load_bias.set_value(jnp.asarray(g.bias))
  return moe


def test_equals_transformers():
  g, moe = golden("longcat"), of_golden()
  routing = moe.route(jnp.asarray(g.x))
  np.testing.assert_array_equal(routing.experts, g.experts)
  np.testing.assert_allclose(routing.weights, g.weights, rtol=1e-5)
  assert_golden(moe, g)
  cost = call(moe, jnp.asarray(g.x))[1]
  assert cost.items == (g.experts < 6).sum() < g.experts.size


def rule(moe, x, tilt=0.0):
  """By hand: gates [*N, E]."""
  taxed = logits(moe.gate, x) - tilt * (np.arange(ALL) < N)
  return only_best(special.softmax(taxed, -1), moe.top_k)


def others_by_hand(moe, x, gates):
  """Experts N, ...: zero, 2 copies, 2 constants."""
  x = np.asarray(x, np.float64)
  mix = np.asarray(moe.others.mix.get_value(), np.float64)
  constant = np.asarray(moe.others.constant.get_value(), np.float64)
  y = gates[..., N + 1, None] * x + gates[..., N + 2, None] * x
  for s in range(2):
    a = special.softmax(x @ mix[s], -1)
    made = a[..., :1] * x + a[..., 1:] * constant[s]
    y += gates[..., N + 3 + s, None] * made
  return y


@pytest.mark.parametrize("tilt", [-1e6, -0.7, 0.0, 0.7, 1e6])
def test_equals_the_formula_at_any_budget(tilt):
  moe = plus_plus()
  gates = rule(moe, X, tilt)
  want = brute_force(moe.experts, X, gates[..., :N])
  want += others_by_hand(moe, X, gates)
  y, cost, signals = call(adjust(moe, tilt), X)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  rows = (gates[..., :N] > 0).sum()
  assert cost.items == rows == signals.choices[0].sum()
  np.testing.assert_array_equal(
    signals.load[0], (gates[..., :N] > 0).sum((0, 1))
  )


def test_rows_fall_as_the_tilt_rises():
  rows = [
    float(call(adjust(plus_plus(), tilt), X)[1].items)
    for tilt in (-1e6, -1.0, 0.0, 1.0, 1e6)
  ]
  assert rows[0] == 3 * B * T and rows[-1] == 0
  assert rows == sorted(rows, reverse=True) and len(set(rows)) == 5


def test_choices_without_weight_run_nothing():
  """Where K exceeds Z, the rest of the choices are FFN experts."""
  moe = adjust(plus_plus(kinds=(0, 1, 0)), 1e6)
  assert ((moe.route(X).experts < N).sum(-1) == 2).all()
  y, cost, _ = call(moe, X)
  assert cost.items == 0
  np.testing.assert_allclose(y, X, rtol=1e-5)


def test_each_kind_of_expert():
  others = shaken(ZeroComputationExperts(D, (1, 1, 1), rngs=nnx.Rngs(0)))
  weights = lambda *w: jnp.broadcast_to(jnp.float32(w), (B, T, 3))
  assert not np.any(others(X, weights(3, 0, 0)))
  np.testing.assert_allclose(others(X, weights(3, 0.5, 0)), 0.5 * X)
  mix = special.softmax(X @ others.mix.get_value()[0], -1)
  want = mix[..., :1] * X + mix[..., 1:] * others.constant.get_value()
  got = others(X, weights(0, 0, 2))
  np.testing.assert_allclose(got, 2 * want, rtol=1e-5, atol=1e-6)


def test_without_them_it_is_a_plain_mixture():
  moe = plus_plus(kinds=(0, 0, 0))
  gates = probabilities(moe.gate, X)
  chosen = best_of(gates, 3)
  kept = np.zeros_like(gates)
  np.put_along_axis(kept, chosen, 1, -1)
  want = brute_force(moe.experts, X, kept * gates)
  y, cost, _ = call(moe, X)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  assert cost.items == 3 * B * T


@pytest.mark.parametrize("tau", [0.25, 0.75])
@pytest.mark.parametrize("live", [None, LIVE], ids=["all", "some"])
def test_training_has_two_capacities(tau, live):
  """Those of eq. 8; first choices first, then earlier tokens."""
  moe = plus_plus(tau=tau, capacity_factor=0.9, balance=0.4)
  wanted, room = rule(moe, X), 0.9 * T / (tau * N + sum(KINDS))
  limit = np.where(np.arange(ALL) < N, np.ceil(tau * room), np.ceil(room))
  there = np.ones((B, T), bool) if live is None else np.asarray(live)
  wanted[~there] = 0
  gates, lost = np.zeros_like(wanted), 0
  for b in range(B):
    taken = np.zeros(ALL)
    for k in range(3):
      for t in range(T):
        e = best_of(wanted[b, t], 3)[k]
        if not wanted[b, t, e]:
          continue
        if taken[e] < limit[e]:
          gates[b, t, e], taken[e] = wanted[b, t, e], taken[e] + 1
        else:
          lost += 1
  routing = moe.route(X, live, KEY)
  np.testing.assert_allclose(
    gates_of(routing, ALL), gates, rtol=1e-4, atol=1e-6
  )
  assert routing.dropped == lost > 0
  p, used = probabilities(moe.gate, X)[there], (wanted[there] > 0).mean(0)
  eta = np.where(np.arange(ALL) < N, 1, tau)
  want = 0.4 * (eta * used * p.mean(0)).sum()
  np.testing.assert_allclose(routing.penalty, want, rtol=1e-5)
  y, cost, signals = call(moe, X, live, KEY)
  np.testing.assert_allclose(signals.penalty, want, rtol=1e-5)
  assert cost.dropped == lost
  out = brute_force(moe.experts, X, gates[..., :N])
  out += others_by_hand(moe, X, gates)
  np.testing.assert_allclose(y, out, rtol=1e-4, atol=1e-5)


def test_a_small_tau_sends_tokens_to_the_cheap():
  """The penalty alone, from the same start."""

  def rows(tau):
    moe = plus_plus(tau=tau, balance=1.0, capacity_factor=None)
    kernel, x = moe.gate.kernel.get_value(), X.at[..., 0].set(1)

    @jax.jit
    def step(kernel):
      loss = lambda k: set_gate(moe, k).route(x, None, KEY).penalty
      return kernel - jax.grad(loss)(kernel)

    for _ in range(60):
      kernel = step(kernel)
    return (gates_of(set_gate(moe, kernel).route(x), ALL)[..., :N] > 0).sum()

  assert rows(0.1) < rows(1.0) < rows(10.0)


def test_the_bias_aims_at_the_active_experts():
  """Its gradient is what an FFN expert has too much; nothing else has one."""
  moe = of_golden()
  x = jnp.asarray(golden("longcat").x)
  loss = lambda m: m.route(x, None, KEY).penalty
  value, slope = jax.value_and_grad(loss)(moe)
  used = (gates_of(moe.route(x), 9) > 0).mean((0, 1))
  want = np.where(np.arange(9) < 6, (used - 2 / 6) / 3, 0)
  np.testing.assert_allclose(slope.load_bias.get_value(), want, atol=1e-6)
  assert value == 0
  slope.load_bias.set_value(jnp.zeros(9))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize("active", [1.0, 2.5])
def test_descent_on_the_bias_reaches_the_active_experts(active):
  moe = copy(plus_plus(3, E, (0, 4, 0), active=active))
  x = jax.random.normal(jax.random.key(1), (1, 512, D))

  @jax.jit
  def train(bias):
    def step(bias, _):
      slope = jax.grad(lambda b: _with(moe, b).route(x, None, KEY).penalty)
      return bias - 0.05 * slope(bias), None

    return jax.lax.scan(step, bias, None, 1500)[0]

  routing = _with(moe, train(jnp.zeros(E + 4))).route(x)
  assert abs((routing.experts < E).sum(-1).mean() - active) < 0.1


def _with(moe, bias):
  moe = copy(moe)
  moe.load_bias.set_value(bias)
  return moe


@pytest.mark.parametrize("key", [None, KEY], ids=["inference", "training"])
def test_tokens_that_are_not_live_get_zero(key):
  nan = jnp.where(LIVE[..., None], X, jnp.nan)
  y, cost, _ = call(plus_plus(), nan, LIVE, key)
  assert not np.any(y[~LIVE]) and np.isfinite(y).all()
  want, same, _ = call(plus_plus(), X, LIVE, key)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
  assert cost.items == same.items
  nobody = call(plus_plus(), nan, jnp.zeros((B, T), bool), key)
  assert not np.any(nobody[0]) and nobody[1].items == 0


def test_the_task_reaches_all_parameters():
  moe = plus_plus(5)
  grads = jax.jit(jax.grad(lambda m: jnp.sin(m(X)[0]).sum()))(moe)
  for name in ("experts", "gate", "others"):
    assert all(np.any(leaf) for leaf in jax.tree.leaves(getattr(grads, name)))


def test_the_cost_has_no_row_for_the_cheap():
  _, cost, _ = call(adjust(plus_plus(), 1e6), X)
  asking = 2.0 * B * T * D * (ALL + 2 * 2) + 2.0 * B * T * 2 * D
  np.testing.assert_allclose(cost.spent, asking)
  np.testing.assert_allclose(cost.full, 6.0 * D * F * B * T * N)


@pytest.mark.parametrize(
  ("settings", "match"),
  [
    ({"top_k": 9}, "9 different choices"),
    ({"top_k": 0}, "0 different choices"),
    ({"kinds": (-1, 1, 1)}, "kinds"),
    ({"tau": 0.0}, "tau"),
    ({"capacity_factor": 0.0}, "capacity_factor"),
    ({"capacity_factor": float("nan")}, "capacity_factor"),
  ],
)
def test_refuses_what_cannot_be(settings, match):
  with pytest.raises(ValueError, match=match):
    MoEPlusPlus(experts(N), D, rngs=nnx.Rngs(0), **settings)


def test_refuses_nan():
  with pytest.raises(ValueError, match="NaN"):
    plus_plus()(X.at[0, 0, 0].set(jnp.nan))
