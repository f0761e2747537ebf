# SPDX-License-Identifier: Apache-2.0
"""Law: ACT is the recurrent block, each token stopped when its h sum to one.

The oracle runs all steps for all tokens, one at a time, and freezes by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core import Ponder, ponder
from adaptivejax.methods.depth import AdaptiveComputationTime
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import adjust
from tests import reference
from tests.methods.host import shaken

B, T, D, STEPS = 3, 5, 16, 4
CONFIG = DecoderConfig(
  vocab=11, layers=1, features=D, hidden=24, heads=2, kv_heads=1
)
X = jax.random.normal(jax.random.key(0), (B, T, D))
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))


def make(rngs):
  block = decoder_block(CONFIG, rngs)
  return AdaptiveComputationTime(block, D, steps=STEPS, rngs=rngs)


@functools.cache
def module(level=0.0):
  return adjust(shaken(make(nnx.Rngs(0))), level)


def replay(module, x, live=None):
  """`(y, N, R)`: all tokens, all steps, frozen by hand."""
  given = np.ones(x.shape[:2], bool) if live is None else live
  going, total = given.copy(), np.zeros(x.shape[:2])
  y, steps, rest = np.zeros(x.shape), np.zeros(x.shape[:2], int), total.copy()
  for n, time in enumerate(np.asarray(module.times.get_value())):
    s = np.where(going[..., None], x + time, x)
    mixed = reference.norm(module.block.norm_attention, s)
    after = s + reference.attention(module.block.attention, mixed, given)
    fed = reference.norm(module.block.norm_mlp, after)
    after = after + reference.mlp(module.block.mlp, fed)
    x = np.where(going[..., None], after, x)
    logit = 1 + reference.score(module.router, x)[..., 0]
    h = np.asarray(jax.nn.sigmoid(logit + module.level.get_value()))
    stop = going & ((total + h >= 0.99) | (n == STEPS - 1))
    weight = np.where(stop, 1 - total, h) * going
    y += weight[..., None] * x
    rest = np.where(stop, 1 - total, rest)
    steps = np.where(going, n + 1, steps)
    total, going = total + weight, going & ~stop
  return np.where(given[..., None], y, x), steps, rest


@functools.partial(jax.jit, static_argnames="train")
def run(module, x, live=None, train=False):
  key = jax.random.key(0) if train else None
  return module.ponder(x, POSITIONS, live, key)


@pytest.mark.parametrize("train", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("level", [-2.0, -1.0, 0.0])
def test_equals_the_replay(level, train):
  y, steps, rest = replay(module(level), X)
  assert len(np.unique(steps)) > 1, "the case decides nothing"
  got = run(module(level), X, train=train)
  np.testing.assert_array_equal(got[1], steps)
  np.testing.assert_allclose(got[0], y, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got[2], rest, rtol=1e-4, atol=1e-5)


def test_tokens_that_are_not_live_pass_and_are_not_seen():
  live = np.ones((B, T), bool)
  live[0, 1] = live[2, 3:] = False
  y, steps, rest = replay(module(-1.0), X, live)
  bad = jnp.where(live[..., None], X, jnp.nan)
  got = run(module(-1.0), bad, jnp.asarray(live))
  np.testing.assert_array_equal(got[1], steps)
  np.testing.assert_allclose(got[0][live], y[live], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(got[0][~live], bad[~live])
  np.testing.assert_allclose(got[2], rest, rtol=1e-4, atol=1e-5)


def test_gradients_never_read_tokens_that_are_not_live():
  live = jnp.array([[1, 1, 1, 0, 1]], bool)

  def loss(module, x):
    y, _, rest, _ = module.ponder(x, POSITIONS[:1], live, jax.random.key(0))
    return jnp.sin(jnp.where(live[..., None], y, 0)).sum() + rest.sum()

  slope = jax.jit(jax.grad(loss, argnums=(0, 1)))
  want = slope(module(-1.0), X[:1])
  got = slope(module(-1.0), X[:1].at[0, 3].set(jnp.nan))
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, got, want)
  assert not got[1][0, 3].any() and got[1][0, 2].any()


def test_the_weights_of_a_token_sum_to_one():
  """So a state that never changes comes out as it went in."""
  h = jax.random.uniform(jax.random.key(1), (6, 50))
  state, memory = jnp.full((50, 2), 3.0), Ponder.start(jnp.zeros((50, 2)))
  done = jnp.zeros(50, bool)
  for n, stop in enumerate(h):
    halts, new = ponder(stop, state, memory, last=n == 5)
    keep = lambda a, b, d=done: jnp.where(
      d.reshape(-1, *[1] * (a.ndim - 1)), a, b
    )
    memory = jax.tree.map(keep, memory, new)
    done |= halts
  assert done.all()
  np.testing.assert_allclose(memory.y, 3, rtol=1e-6)
  np.testing.assert_allclose(memory.halted, 1, rtol=1e-6)


def test_the_ponder_cost_has_the_slope_of_the_remainder():
  """Against finite differences, where no token changes its N."""
  base = module(-1.0)

  def cost(shift):
    moved = adjust(base, -1.0 + shift)
    return moved(X, POSITIONS, key=jax.random.key(0))[3].penalty

  small = 1e-3
  rise = (cost(small) - cost(-small)) / (2 * small)
  same = [run(adjust(base, -1.0 + s), X)[1] for s in (-small, 0, small)]
  np.testing.assert_array_equal(same[0], same[2])
  np.testing.assert_allclose(jax.grad(cost)(0.0), rise, rtol=1e-2)
  _, steps, rest, _ = run(base, X)
  np.testing.assert_allclose(cost(0.0), (steps + rest).mean(), rtol=1e-5)


def test_fewer_steps_cost_less():
  spent = [run(module(level), X)[3] for level in (-1e6, -1.0, 1e6)]
  assert spent[0].spent > spent[1].spent > 3 * spent[2].spent
  np.testing.assert_allclose(spent[0].full, spent[2].full, rtol=1e-6)
  np.testing.assert_array_equal(run(module(1e6), X)[1], 1)


def test_it_is_a_layer_of_a_language_model():
  """Causal, and refused where there is a cache."""
  model = shaken(DecoderLM(CONFIG, layer=make, rngs=nnx.Rngs(0)))
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, T)))
  logits = model(tokens).logits
  moved = model(tokens.at[:, -1].set(0)).logits
  np.testing.assert_allclose(logits[:, :-1], moved[:, :-1], atol=1e-5)
  with pytest.raises(ValueError, match="whole sequences"):
    model(tokens, model.empty_cache(2, T))


@pytest.mark.parametrize("bad", [{"steps": 0}, {"epsilon": 1.0}])
def test_bad_input_is_refused_in_words(bad):
  block = decoder_block(CONFIG, nnx.Rngs(0))
  with pytest.raises(ValueError, match=next(iter(bad))):
    AdaptiveComputationTime(block, D, rngs=nnx.Rngs(0), **bad)
