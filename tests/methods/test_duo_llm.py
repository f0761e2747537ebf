# SPDX-License-Identifier: Apache-2.0
"""Law: each token goes its own way, and the oracle is exhaustive search."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.methods.depth import (
  DuoMlp,
  follow,
  oracle,
  pattern_losses,
  patterns,
)
from adaptivejax.models import decoder_block
from adaptivejax.nn import Mlp, adjust
from tests import reference
from tests.methods.host import CONFIG, PROMPT, TOKENS, decode, model, shaken

L, D, F, SMALL = CONFIG.layers, CONFIG.features, CONFIG.hidden, 8
X = jax.random.normal(jax.random.key(0), (3, 12, D))
KEY = jax.random.key(9)


def make(rngs, random=False):
  small, big = Mlp(D, SMALL, rngs=rngs), Mlp(D, F, rngs=rngs)
  return DuoMlp(small, big, D, random=random, rngs=rngs)


@functools.cache
def duo(random=False):
  return shaken(make(nnx.Rngs(0), random))


def layer(rngs):
  return decoder_block(CONFIG, rngs, make(rngs))


def by_hand(module, x, choice):
  ways = 0 * x, reference.mlp(module.small, x), reference.mlp(module.big, x)
  return sum(
    np.where((choice == c)[..., None], y, 0) for c, y in enumerate(ways)
  )


def one_size(model, size):
  """The ordinary model of all small, or all big, feed-forward layers."""
  model = jax.tree.map(lambda a: a, model)  # a copy
  model.layers.mlp = getattr(model.layers.mlp, size)
  return model


@pytest.mark.parametrize("tilt", [-3.0, 1.0, 2.0, 3.5])
def test_each_token_goes_the_way_of_its_highest_score(tilt):
  module = adjust(duo(), tilt)
  score = np.asarray(reference.score(module.router, X))
  choice = (score - tilt * np.array([0, SMALL / F, 1])).argmax(-1)
  assert len(np.unique(choice)) > 1 or tilt < 0
  y, cost, signals = jax.jit(lambda m: m(X))(module)
  np.testing.assert_allclose(
    y, by_hand(module, X, choice), rtol=1e-4, atol=1e-5
  )
  share = np.array([0, SMALL / F, 1])[choice].mean()
  np.testing.assert_allclose(signals.share, share, rtol=1e-6)
  assert cost.items == (choice > 0).sum()
  assert cost.full == 4 * D * F * choice.size
  least = 4 * D * F * share * choice.size + 2 * D * 3 * choice.size
  assert least * (1 - 1e-6) <= cost.spent


@pytest.mark.parametrize(("way", "size"), [(1, "small"), (2, "big")])
def test_one_way_for_all_is_that_model_bit_by_bit(way, size):
  host = model(layer)
  got = jax.jit(lambda m: m(TOKENS))(follow(host, jnp.full(L, way)))
  want = jax.jit(lambda m: m(TOKENS))(one_size(host, size))
  np.testing.assert_array_equal(got.logits, want.logits)


def test_tokens_that_are_not_live_are_zero_and_cost_nothing():
  live = jnp.arange(12) % 3 > 0
  live = jnp.broadcast_to(live, X.shape[:2])
  module = adjust(duo(), 1.0)
  for m, key in ((module, None), (duo(), KEY), (duo(True), KEY)):
    run = jax.jit(lambda m, x, key=key: m(x, live, key))
    y, cost, _ = run(m, X)
    assert not np.any(y[~live]) and np.any(y[live])
    again = run(m, jnp.where(live[..., None], X, jnp.nan))
    np.testing.assert_array_equal(y, again[0])
    if key is None:
      assert cost.items < live.sum() + 1


def test_random_training_draws_all_ways_alike_whatever_the_router():
  x = jnp.tile(X, (40, 1, 1))
  run = jax.jit(lambda m: m(x, None, KEY))
  y, cost, signals = run(duo(True))
  small, big = (
    np.asarray(reference.mlp(m, x)) for m in (duo().small, duo().big)
  )
  near = lambda a, b: np.abs(a - b).max(-1) < 1e-4
  ways = np.stack([near(y, 0), near(y, small), near(y, big)])
  assert ways.any(0).all()
  np.testing.assert_allclose(ways.mean((1, 2)), 1 / 3, atol=0.04)
  share = ways.mean((1, 2)) @ [0, SMALL / F, 1]
  np.testing.assert_allclose(signals.share, share, rtol=1e-5)
  assert cost.items == ways[1:].sum()
  np.testing.assert_array_equal(run(adjust(duo(True), 5.0))[0], y)
  other = duo(True)(x, None, jax.random.key(1))[0]
  assert np.any(np.asarray(other) != np.asarray(y))


@pytest.mark.parametrize("random", [True, False])
def test_what_learns_in_which_stage(random):
  def loss(m):
    y, _, signals = m(X, None, KEY)
    return jnp.sin(y).sum() + signals.share

  grads = jax.jit(jax.grad(loss))(duo(random))
  moved = lambda tree: any(np.any(a) for a in jax.tree.leaves(tree))
  assert moved(grads.small) and moved(grads.big)
  assert moved(grads.router) != random


def test_a_learning_step_is_a_straight_through_sample():
  """Each token takes one way whole; the share moves the router."""
  y, _, signals = duo()(X, None, KEY)
  noise = jax.random.gumbel(KEY, (*X.shape[:2], 3), jnp.float32)
  choice = np.asarray(reference.score(duo().router, X) + noise).argmax(-1)
  assert len(np.unique(choice)) == 3
  np.testing.assert_allclose(y, by_hand(duo(), X, choice), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    signals.share, np.array([0, SMALL / F, 1])[choice].mean(), rtol=1e-5
  )
  share = lambda b: _biased(b)(X, None, KEY)[2].share
  slope = jax.grad(share)(jnp.zeros(3))
  assert slope[2] > 0 > slope[0]


def _biased(b):
  module = jax.tree.map(lambda a: a, duo())  # a copy
  bias = module.router.outer.bias
  bias.set_value(bias.get_value() + b)
  return module


def losses_by_hand(model, pattern):
  """Next-token losses when layer l goes the way `pattern[l]`."""
  x = model.embedding.get_value()[TOKENS[:, :-1]]
  for block, way in zip(reference.layers_of(model), pattern):
    h = reference.norm(block.norm_attention, x)
    x = x + reference.attention(block.attention, h)
    h = reference.norm(block.norm_mlp, x)
    if way:
      x = x + reference.mlp((block.mlp.small, block.mlp.big)[way - 1], h)
  odds = np.asarray(jax.nn.softmax(reference.readout(model, x)), np.float64)
  return -np.log(np.take_along_axis(odds, TOKENS[:, 1:, None], -1))[..., 0]


def test_the_oracle_is_exhaustive_search():
  host = model(layer)
  table = patterns(L)
  assert [tuple(p) for p in np.asarray(table)] == [
    *itertools.product(range(3), repeat=L)
  ]
  run = jax.jit(pattern_losses)
  losses = run(host, TOKENS, table)
  # a few by hand, all by the minimum over what was found
  for i in (0, 7, 40, 66, 80):
    want = losses_by_hand(host, tuple(np.asarray(table)[i]))
    np.testing.assert_allclose(losses[i], want, rtol=1e-3, atol=1e-4)
  run(host, TOKENS, table[::-1])
  assert run._cache_size() == 1
  before = np.inf
  for budget in range(L + 1):
    best = np.asarray(oracle(losses, table, budget))
    for b, t in np.ndindex(best.shape):
      want = min(
        float(losses[p, b, t])
        for p, pattern in enumerate(np.asarray(table))
        if (pattern == 2).sum() <= budget
      )
      assert best[b, t] == np.float32(want)
    assert np.all(best <= before)
    before = best


def test_patterns_of_some_ways_only():
  np.testing.assert_array_equal(
    patterns(2, (1, 2)), [[1, 1], [1, 2], [2, 1], [2, 2]]
  )


def test_following_a_pattern_leaves_the_model_as_it_was():
  host = model(layer)
  before = [np.array(a) for a in jax.tree.leaves(host)]
  follow(host, jnp.zeros(L, jnp.int32))
  for a, b in zip(before, jax.tree.leaves(host)):
    np.testing.assert_array_equal(a, b)


def test_prefill_is_token_by_token_decoding():
  host = adjust(model(layer), 2.0)
  whole = host(TOKENS, host.empty_cache(*TOKENS.shape))
  logits, _, _, cache = decode(host, TOKENS)
  np.testing.assert_allclose(
    logits, whole.logits[:, PROMPT:], rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(cache.k, whole.cache.k, rtol=1e-4, atol=1e-5)
