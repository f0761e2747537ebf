# SPDX-License-Identifier: Apache-2.0
"""Law: the experts of a layer sum to it, and K of them come near."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.subsets import best_subset
from adaptivejax.methods.experts import FactorLLM
from adaptivejax.nn import Frozen, Mlp, adjust, cluster_neurons
from adaptivejax.training.step import split
from tests import reference
from tests.methods.host import shaken
from tests.methods.mixtures import call

B, T, D, F, E = 2, 6, 8, 24, 4
X = jax.random.normal(jax.random.key(0), (B, T, D))
KEY = jax.random.key(1)


@functools.cache
def mlp(gated):
  return Mlp(D, F, gated=gated, activation=jax.nn.silu, rngs=nnx.Rngs(0))


def order_of(name, layer):
  if name == "clusters":
    return cluster_neurons(layer, E)
  if name == "random":
    return np.random.default_rng(0).permutation(F)
  return None


@functools.cache
def module(gated=True, **settings):
  made = FactorLLM(mlp(gated), E, rngs=nnx.Rngs(1), **settings)
  made.router = shaken(made.router)
  return made


def parts_of(factored):
  pick = lambda i: jax.tree.map(lambda a: a[i], factored.experts)
  return np.stack([reference.mlp(pick(i), X) for i in range(E)])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("order", ["contiguous", "random", "clusters"])
def test_all_experts_are_the_layer(order, gated):
  dense = mlp(gated)
  want = reference.mlp(dense, X)
  for top_k, fewer in ((E, 0.0), (2, -2.0)):
    made = FactorLLM(
      dense, E, top_k=top_k, order=order_of(order, dense), rngs=nnx.Rngs(1)
    )
    for key in (None, KEY):
      y, cost, _ = call(adjust(made, fewer), X, None, key)
      np.testing.assert_allclose(y, want, rtol=0, atol=1e-6)
      assert cost.items == E * B * T


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("fewer", [1.0, 0.0, -1.0])
def test_the_best_of_the_router_are_scaled_up(fewer, gated):
  factored, k = adjust(module(gated), fewer), 2 - int(fewer)
  logits = reference.score(factored.router, X)
  rank = np.argsort(np.argsort(-np.asarray(logits), -1, kind="stable"), -1)
  parts = parts_of(factored)
  want = E / k * np.einsum("ebtd,bte->btd", parts, rank < k)
  for key in (None, KEY):
    y, _, signals = call(factored, X, None, key)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(signals.choices[0], k)
    np.testing.assert_array_equal(signals.load[0], (rank < k).sum((0, 1)))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_best_subset_is_the_nearest_of_all(k):
  rng = np.random.default_rng(k)
  parts, wanted = rng.normal(size=(E, 20, D)), rng.normal(size=(20, D))
  found = best_subset(*map(jnp.float32, (parts, wanted)), k)
  for n in range(20):
    far = {
      subset: np.sum((wanted[n] - parts[list(subset), n].sum(0)) ** 2)
      for subset in itertools.combinations(range(E), k)
    }
    assert tuple(np.flatnonzero(found[n])) == min(far, key=far.get)


def test_the_prior_is_the_divergence_from_the_best_experts():
  factored = jax.tree.map(lambda a: a, module(balance=0.0))  # a copy
  # The experts have moved on, the teacher has not.
  factored.experts = shaken(factored.experts, seed=3)
  parts, wanted = parts_of(factored), reference.mlp(mlp(True), X)
  best = best_subset(
    jnp.asarray(parts.reshape(E, -1, D)), wanted.reshape(-1, D), 2
  )
  logits = np.asarray(reference.score(factored.router, X), np.float64)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  q = np.exp(np.asarray(best, np.float64)).reshape(p.shape)
  q = q / q.sum(-1, keepdims=True)
  want = 0.05 * (p * np.log(p / q)).sum(-1)
  got = call(factored, X, None, KEY)[2].penalty
  np.testing.assert_allclose(got, want.mean(), rtol=1e-4)
  live = jnp.arange(T) < jnp.array([[2], [5]])
  got = call(factored, X, live, KEY)[2].penalty
  np.testing.assert_allclose(got, want[np.asarray(live)].mean(), rtol=1e-4)
  assert call(factored, X)[2].penalty == 0


def test_the_prior_moves_the_router_and_nothing_else():
  factored = module(balance=0.0)
  join, params = split(factored)
  assert not any("teacher" in str(path) for path, _ in _leaves(params))
  slope = jax.grad(lambda p: join(p)(X, key=KEY)[2].penalty)(params)
  for path, leaf in _leaves(slope):
    assert np.any(leaf) == ("router" in str(path)), path


def _leaves(tree):
  return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_following_the_prior_the_router_finds_the_best_experts():
  factored = module(balance=0.0, prior=1.0)
  few = lambda a: a.reshape(*a.shape[:-3], -1, D)[..., :4, :]
  x, parts = few(X), few(parts_of(factored))
  best = best_subset(jnp.asarray(parts), few(reference.mlp(mlp(True), X)), 2)
  join, params = split(factored)
  slope = jax.jit(jax.grad(lambda p: join(p)(x, key=KEY)[2].penalty))
  agree = lambda p: (join(p).choose(join(p).router(x)) == best).mean()
  assert agree(params) < 0.9
  for _ in range(200):
    params = jax.tree.map(lambda a, g: a - g, params, slope(params))
  assert agree(params) == 1


def _chosen(factored):
  return factored.choose(factored.router(X)).reshape(-1, E)


def test_without_a_teacher_training_runs_what_was_chosen():
  alone = module(prior=0.0)
  assert alone.teacher is None
  cost, signals = call(alone, X, None, KEY)[1:]
  assert cost.items == 2 * B * T
  chosen = np.asarray(_chosen(alone), np.float64).mean(0)
  wanted = jax.nn.softmax(alone.router(X)).mean((0, 1))
  np.testing.assert_allclose(
    signals.penalty, 0.01 * E * (chosen * wanted).sum(), rtol=1e-5
  )


def test_training_pays_for_the_teacher_too():
  cost = call(module(), X, None, KEY)[1]
  layer = 2 * 3 * D * F * B * T
  np.testing.assert_allclose(cost.full, layer)
  np.testing.assert_allclose(cost.spent, 2 * layer + 2 * B * T * D * E)


def test_clusters_are_of_equal_size_and_find_planted_ones():
  layer = jax.tree.map(lambda a: a, mlp(False))  # a copy
  rng = np.random.default_rng(0)
  planted = rng.permutation(np.repeat(np.arange(E), F // E))
  directions = np.linalg.qr(rng.normal(size=(D, D)))[0][:, :E]
  size = rng.uniform(0.5, 2, F)  # of the weights, which does not matter
  weights = directions[:, planted] * size + 0.05 * rng.normal(size=(D, F))
  layer.up.kernel.set_value(jnp.asarray(weights, jnp.float32))
  found = planted[cluster_neurons(layer, E)].reshape(E, -1)
  assert (found == found[:, :1]).all()
  assert sorted(found[:, 0]) == list(range(E))


def test_the_teacher_is_kept_apart():
  values = nnx.state(module(), Frozen)
  assert len(jax.tree.leaves(values)) == 3


@pytest.mark.parametrize(
  ("settings", "word"),
  [
    ({"experts": 5}, "parts"),
    ({"top_k": 5}, "choices"),
    ({"order": np.arange(3)}, "order"),
    ({"experts": 24, "top_k": 12}, "prior=0"),
  ],
)
def test_refuses_what_cannot_be(settings, word):
  settings = {"experts": E, "top_k": 2} | settings
  with pytest.raises(ValueError, match=word):
    FactorLLM(mlp(False), rngs=nnx.Rngs(0), **settings)
  with pytest.raises(ValueError, match="equal size"):
    cluster_neurons(mlp(False), 5)
