# SPDX-License-Identifier: Apache-2.0
"""Law: k learners of a split layer are the first k parts of its sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.budget import budget_loss
from adaptivejax.methods.width import AdaptiveComputationModule
from adaptivejax.nn import Mlp, adjust, split_mlp
from tests import reference
from tests.methods.host import shaken

D, F, M = 16, 32, 4
X = jax.random.normal(jax.random.key(0), (3, 8, D))
KEY = jax.random.key(5)


def mlp(gated=False):
  return Mlp(D, F, gated=gated, activation=jax.nn.silu, rngs=nnx.Rngs(0))


@functools.cache
def module(gated=False):
  learners = split_mlp(mlp(gated), M)
  return shaken(AdaptiveComputationModule(learners, D, rngs=nnx.Rngs(1)))


def with_gate(acm, bias):
  """The gate at chance, but for a bias per choice."""
  acm = jax.tree.map(lambda a: a, acm)  # a copy
  outer = acm.gate.outer
  outer.kernel = nnx.Param(jnp.zeros_like(outer.kernel.get_value()))
  outer.bias = nnx.Param(jnp.asarray(bias, jnp.float32))
  return acm


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("learners", [1, 2, 4, 32])
def test_a_split_layer_sums_to_the_layer(gated, learners):
  parts = split_mlp(mlp(gated), learners)
  y = jax.vmap(Mlp.rows, in_axes=(0, None))(parts, X).sum(0)
  np.testing.assert_allclose(y, mlp(gated).rows(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learners", [0, -1, 3, 64])
def test_refuses_a_split_with_a_remainder(learners):
  with pytest.raises(ValueError, match="parts"):
    split_mlp(mlp(), learners)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("level", range(M + 1))
def test_a_level_is_a_prefix_of_the_sum(gated, level):
  acm = with_gate(module(gated), jnp.arange(M + 1) == level)
  y, cost, signals = acm(X)
  want = reference.mlp(acm, X, np.full(X.shape[:2], level))
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(signals.share, level / M)
  gate = 2 * X[..., 0].size * (D * 16 + 16 * (M + 1))
  np.testing.assert_allclose(cost.spent - gate, cost.full * level / M)


def test_mixed_levels_are_those_of_the_gate():
  acm = adjust(module(), 3.0)
  kernel = acm.gate.outer.kernel
  kernel.set_value(8 * kernel.get_value())  # a gate with opinions
  logits = acm.gate(X) - 3.0 * np.arange(M + 1)
  level = np.asarray(logits).argmax(-1)
  assert len(np.unique(level)) > 2
  want = reference.mlp(acm, X, level)
  np.testing.assert_allclose(acm(X)[0], want, rtol=1e-4, atol=1e-5)


def test_a_token_does_not_depend_on_its_batch():
  """Published code gave the tokens at the batch's maximum a learner less."""
  acm = adjust(module(), 0.5)
  together = acm(X)[0]
  for b, t in [(0, 0), (1, 3), (2, 7)]:
    alone = acm(X[b : b + 1, t : t + 1])[0]
    np.testing.assert_allclose(
      alone[0, 0], together[b, t], rtol=1e-4, atol=1e-5
    )


def test_tokens_that_are_not_live_get_zero():
  live = jnp.arange(8) % 3 == jnp.zeros((3, 1), jnp.int32)
  nan = jnp.where(live[..., None], X, jnp.nan)
  for key in (None, KEY):
    y, cost, signals = module()(nan, live, key)
    want = module()(X, live, key)[0]
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    assert not np.any(np.asarray(y)[~np.asarray(live)])
    assert np.isfinite(signals.share)
    if key is None:
      asked = np.where(live, module().level(X), 0).sum()
      assert cost.items == asked


def test_training_pays_for_all_learners_and_the_gate():
  cost = module()(X, key=KEY)[1]
  gate = 2 * X[..., 0].size * (D * 16 + 16 * (M + 1))
  np.testing.assert_allclose(cost.full, 4 * X.size * F)
  np.testing.assert_allclose(cost.spent, cost.full + gate)


def test_training_computes_a_sampled_level():
  """The forward value is hard: it is that of some whole number of learners."""
  acm = with_gate(module(), jnp.zeros(M + 1))
  y, _, signals = acm(X, key=KEY)
  parts = jax.vmap(Mlp.rows, in_axes=(0, None))(acm.learners, X)
  sums = np.concatenate([np.zeros_like(parts[:1]), np.cumsum(parts, 0)])
  gap = np.abs(sums - np.asarray(y)).max(-1)
  np.testing.assert_allclose(gap.min(0), 0, atol=1e-5)
  level = gap.argmin(0)
  assert set(np.unique(level)) == set(range(M + 1))
  np.testing.assert_allclose(signals.share, level.mean() / M, rtol=1e-6)


def test_the_task_reaches_the_gate_and_all_learners():
  grads = jax.grad(lambda m: (m(X, key=KEY)[0] ** 2).sum())(module())
  for leaf in jax.tree.leaves((grads.gate, grads.learners)):
    assert np.any(leaf)
  for inference in jax.tree.leaves(
    jax.grad(lambda m: (m(X)[0] ** 2).sum())(module()).gate
  ):
    assert not np.any(inference)


@pytest.mark.parametrize("target", [0.25, 0.75])
def test_a_budget_loss_moves_the_gate_to_its_target(target):
  acm = with_gate(module(), jnp.zeros(M + 1))

  @jax.jit
  def step(bias, key):
    def loss(bias):
      share = with_gate(acm, bias)(X, key=key)[2].share
      return budget_loss(share, target, squared=True), share

    slope, share = jax.grad(loss, has_aux=True)(bias)
    return bias - 4 * slope, share

  bias, shares = jnp.zeros(M + 1), []
  for key in jax.random.split(jax.random.key(0), 200):
    bias, share = step(bias, key)
    shares.append(share)
  assert abs(np.mean(shares[-50:]) - target) < 0.05


def test_the_penalty_rewards_diverse_use():
  """Entropy within a sequence, distance between the loads of sequences."""
  acm = module()
  use = np.asarray(jax.nn.softmax(acm.gate(X)), np.float64).mean(1)
  entropy = -(use * np.log(use)).sum(-1) / np.log(M + 1)
  load = use @ np.arange(M + 1) / M
  apart = np.mean([abs(a - b) for a in load for b in load])
  penalty = acm(X, key=KEY)[2].penalty
  np.testing.assert_allclose(
    penalty, -0.05 * (entropy.mean() + apart), rtol=1e-4
  )
  assert acm(X)[2].penalty == 0


def test_an_untrained_gate_asks_for_all():
  learners = split_mlp(mlp(), M)
  acm = AdaptiveComputationModule(learners, D, rngs=nnx.Rngs(1))
  np.testing.assert_array_equal(acm.level(0.1 * X), M)
  np.testing.assert_allclose(
    acm(0.1 * X)[0], mlp().rows(0.1 * X), rtol=1e-4, atol=1e-5
  )
