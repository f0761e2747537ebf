# SPDX-License-Identifier: Apache-2.0
"""Law: a Mixture-of-Depths layer is its block on the chosen tokens, weighted;
chosen by top-k in training and causally, by the predictor, ever after.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.methods.depth import MixtureOfDepths
from adaptivejax.methods.width import AdaptiveComputationModule
from adaptivejax.models import decoder_block
from adaptivejax.nn import Group, adjust, split_mlp
from tests import reference
from tests.methods.host import CONFIG, PROMPT, TOKENS, decode, model, shaken

D, T = CONFIG.features, 12
X = jax.random.normal(jax.random.key(0), (3, T, D))
POSITIONS = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), X.shape[:2])
KEY = jax.random.key(9)


@functools.cache
def layer(capacity=0.5):
  rngs = nnx.Rngs(0)
  block = decoder_block(CONFIG, rngs)
  return shaken(MixtureOfDepths(block, D, capacity=capacity, rngs=rngs))


def train(module, x=X):
  return jax.jit(lambda m, x: m(x, POSITIONS, key=KEY))(module, x)


def replaced(module, **values):
  """A copy with other router parameters."""
  module = jax.tree.map(lambda a: a, module)
  outer = module.router.outer
  outer.kernel = nnx.Param(jnp.full_like(outer.kernel.get_value(), 0.0))
  outer.bias = nnx.Param(jnp.full_like(outer.bias.get_value(), values["bias"]))
  return module


@pytest.mark.parametrize(
  ("capacity", "k"), [(0.125, 2), (0.25, 3), (0.5, 6), (0.6, 8), (1.0, 12)]
)
def test_training_is_the_block_on_the_top_k(capacity, k):
  module = layer(capacity)
  score = np.asarray(reference.score(module.router, X)[..., 0])
  live = np.zeros(score.shape, bool)
  np.put_along_axis(live, np.argsort(-score, 1)[:, :k], True, 1)
  y, _, cost, signals = train(module)
  want = reference.layer(module, X, live)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(y[~live], X[~live])
  np.testing.assert_allclose(signals.share, k / T)
  guess = np.asarray(module.predictor(X)[..., 0], np.float64)
  odds = 1 / (1 + np.exp(-guess))
  bce = -np.where(live, np.log(odds), np.log(1 - odds)).mean()
  np.testing.assert_allclose(signals.penalty, bce, rtol=1e-5)
  assert cost.full == train(layer(1.0))[2].full
  assert (cost.spent < cost.full) == (k < T)


def test_ties_go_to_the_first_tokens():
  module = replaced(layer(0.25), bias=2.0)
  y = train(module)[0]
  live = np.broadcast_to(np.arange(T) < 3, X.shape[:2])
  want = X + 2 * (reference.block(module.block, X, live) - X)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_a_share_of_seven_in_a_hundred_is_seven():
  """In floating point .07 * 100 is above 7."""
  x = jnp.tile(X, (1, 9, 1))[:, :100]
  positions = jnp.broadcast_to(jnp.arange(100, dtype=jnp.int32), x.shape[:2])
  module = layer(0.07)
  shape = jax.eval_shape(lambda m: m(x, positions, key=KEY), module)
  assert shape[0].shape == x.shape
  np.testing.assert_allclose(
    jax.jit(lambda m: m(x, positions, key=KEY))(module)[3].share, 0.07
  )


@pytest.mark.parametrize("training", [True, False])
def test_all_tokens_at_weight_one_is_the_block(training):
  module = adjust(replaced(layer(1.0), bias=1.0), -1e6)
  y = module(X, POSITIONS, key=KEY if training else None)[0]
  want = module.block(X, POSITIONS)[0]
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", [-0.2, 0.1, 0.5])
def test_after_training_the_predictor_chooses(level):
  module = adjust(layer(), level)
  live = np.asarray(module.predictor(X)[..., 0]) > level
  y, _, cost, _ = module(X, POSITIONS)
  want = reference.layer(module, X, live)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  assert 0 < live.sum() < live.size
  assert cost.spent < adjust(layer(), -1e6)(X, POSITIONS)[2].spent


def test_the_future_changes_nothing():
  other = X.at[:, T // 2 :].add(1.0)
  y, z = (layer()(x, POSITIONS)[0] for x in (X, other))
  np.testing.assert_array_equal(y[:, : T // 2], z[:, : T // 2])


def _alternating(rngs):
  return Group([decoder_block(CONFIG, rngs), _mixture(rngs)])


def _mixture(rngs):
  block = decoder_block(CONFIG, rngs)
  learners = split_mlp(block.mlp, 4)
  mlp = AdaptiveComputationModule(learners, D, rngs=rngs)
  block = decoder_block(CONFIG, rngs, mlp)
  return MixtureOfDepths(block, D, capacity=0.5, rngs=rngs)


@pytest.mark.parametrize(
  ("make", "level"), [(_mixture, -0.1), (_alternating, 0.3)]
)
def test_prefill_is_token_by_token_decoding(make, level):
  """Over a cache with holes, where the layer took no key."""
  host = adjust(model(make), level)
  whole = jax.jit(lambda m: m(TOKENS, m.empty_cache(*TOKENS.shape)))(host)
  logits, _, _, cache = decode(host, TOKENS)
  np.testing.assert_allclose(
    logits, whole.logits[:, PROMPT:], rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(cache.pos, whole.cache.pos)
  np.testing.assert_allclose(cache.k, whole.cache.k, rtol=1e-4, atol=1e-5)
  holes = np.asarray(cache.pos) < 0
  assert 0 < holes.mean() < 1


def test_training_prices_what_it_runs():
  """The layers inside adapt too; the whole is still their dense form."""
  out = model(_alternating)(TOKENS, key=KEY)
  dense = model()(TOKENS)
  assert dense.cost.full <= out.cost.full
  assert out.cost.items <= out.cost.capacity
  half = model(_mixture)(TOKENS, key=KEY)
  assert half.cost.spent < out.cost.spent < out.cost.full


def test_task_and_predictor_learn_apart():
  task = jax.grad(lambda m: (train(m)[0] ** 2).sum())(layer())
  guess = jax.grad(lambda m: train(m)[3].penalty)(layer())
  moved = lambda tree: any(np.any(a) for a in jax.tree.leaves(tree))
  assert moved(task.router) and moved(task.block)
  assert not moved(task.predictor)
  assert moved(guess.predictor)
  assert not moved(guess.router) and not moved(guess.block)
  to_input = jax.grad(lambda x: train(layer(), x)[3].penalty)(X)
  assert not np.any(to_input)


def test_router_gradient_is_the_finite_difference():
  def loss(kernel):
    module = jax.tree.map(lambda a: a, layer())
    module.router.outer.kernel = nnx.Param(kernel)
    return jnp.sin(train(module)[0]).sum()

  kernel = layer().router.outer.kernel.get_value()
  step = 1e-3 * jax.random.normal(jax.random.key(3), kernel.shape)
  slope = (loss(kernel + step) - loss(kernel - step)) / 2
  np.testing.assert_allclose(
    slope, (jax.grad(loss)(kernel) * step).sum(), rtol=2e-2
  )


@pytest.mark.parametrize("capacity", [0, -0.5, 1.5, float("nan")])
def test_refuses_a_capacity_that_is_no_share(capacity):
  with pytest.raises(ValueError, match="capacity"):
    MixtureOfDepths(layer().block, D, capacity=capacity, rngs=nnx.Rngs(0))


def test_refuses_top_k_over_a_cache():
  host = model(_mixture)
  with pytest.raises(ValueError, match="not causal"):
    host(TOKENS, host.empty_cache(*TOKENS.shape), key=KEY)
