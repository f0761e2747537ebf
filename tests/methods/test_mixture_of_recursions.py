# SPDX-License-Identifier: Apache-2.0
"""Law: a Mixture-of-Recursions layer is its block over and over, on the tokens
that stay: nested top-k in training, a causal guess or the token's own choice
ever after; over the keys of each recursion or of the first.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.methods.depth import MixtureOfRecursions
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import Group, adjust
from tests import reference
from tests.methods.host import CONFIG, PROMPT, TOKENS, decode, model, shaken

D, T, N = CONFIG.features, 11, 3
X = jax.random.normal(jax.random.key(0), (3, T, D))
POSITIONS = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), X.shape[:2])
KEY = jax.random.key(9)
KINDS = [(r, s) for r in ("expert", "token") for s in (False, True)]
ALWAYS = -1e6


def make(rngs, routing="expert", sharing=False, recursions=N):
  block = decoder_block(CONFIG, rngs)
  return MixtureOfRecursions(
    block, D, recursions=recursions, routing=routing, sharing=sharing, rngs=rngs
  )


@functools.cache
def layer(routing="expert", sharing=False, recursions=N):
  return shaken(make(nnx.Rngs(0), routing, sharing, recursions))


@functools.partial(jax.jit, static_argnames="training")
def run(module, x=X, training=False):
  return module(x, POSITIONS, key=KEY if training else None)


def gated(module, bias):
  """A copy whose routers know nothing but a bias."""
  module = jax.tree.map(lambda a: a, module)
  outer = module.router.outer
  outer.kernel.set_value(0 * outer.kernel.get_value())
  outer.bias.set_value(jnp.broadcast_to(jnp.float32(bias), (N,)))
  return module


@pytest.mark.parametrize("sharing", [False, True])
def test_training_takes_the_nested_top_k(sharing):
  module = layer("expert", sharing)
  live, wrong = [np.ones(X.shape[:2], bool)], []
  for r, k in ((1, 8), (2, 4)):  # of 11: ceil(2/3), ceil(1/3)
    x = reference.recursions(module, X, live)
    score = np.asarray(reference.score(module.router, x))[..., r]
    score = np.where(live[-1], score, -np.inf)
    mask = np.zeros_like(live[0])
    np.put_along_axis(mask, np.argsort(-score, 1)[:, :k], True, 1)
    odds = 1 / (1 + np.exp(-np.asarray(module.predictor(x)[..., r])))
    bce = -np.log(np.where(mask, odds, 1 - odds))
    wrong.append(bce[live[-1]].mean())
    live.append(mask)
  y, cache, cost, signals = run(module, training=True)
  want = reference.recursions(module, X, live)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(signals.penalty, np.mean(wrong), rtol=1e-4)
  np.testing.assert_allclose(signals.share, (11 + 8 + 4) / 33, rtol=1e-6)
  assert cache is None
  assert cost.spent < cost.full and cost.items <= cost.capacity


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("level", [-0.3, 0.0, 0.4])
def test_after_training_the_predictor_decides(level, sharing):
  module = adjust(layer("expert", sharing), level)
  live = [np.ones(X.shape[:2], bool)]
  for r in (1, 2):
    x = reference.recursions(module, X, live)
    live.append(live[-1] & (np.asarray(module.predictor(x))[..., r] > level))
  y, _, _, signals = run(module)
  want = reference.recursions(module, X, live)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(signals.share, np.mean(live), rtol=1e-6)
  assert level or 0 < live[1].mean() < 1


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("level", [-0.3, 0.0, 0.3])
def test_a_token_chooses_its_recursions(level, sharing):
  module = adjust(layer("token", sharing), level)
  score = np.asarray(reference.score(module.router, X))
  depth = (score - level * np.arange(N)).argmax(-1) + 1
  assert len(np.unique(depth)) > 1
  want = reference.recursions(module, X, [depth > r for r in range(N)])
  for training in (False, True):
    y, _, cost, signals = run(module, training=training)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    assert cost.spent < 1.02 * cost.full
  odds = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
  used = np.array([(depth == n + 1).mean() for n in range(N)])
  balance = 0.1 * N * (used * odds.mean((0, 1))).sum()
  np.testing.assert_allclose(signals.penalty, balance, rtol=1e-5)
  expected = (odds * (np.arange(N) + 1)).sum(-1).mean() / N
  np.testing.assert_allclose(signals.share, expected, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_all_tokens_at_weight_one_is_the_recursive_transformer(training):
  module = gated(adjust(layer("expert"), ALWAYS), 1e3)
  if training:  # one recursion takes all; more would leave some out
    module.recursions = 1
  x = X
  for _ in range(module.recursions):
    x = module.block(x, POSITIONS)[0]
  y = run(module, training=training)[0]
  np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)


def test_one_recursion_by_token_choice_is_the_block():
  module = layer("token", False, 1)
  y = run(module)[0]
  np.testing.assert_allclose(
    y, module.block(X, POSITIONS)[0], rtol=1e-5, atol=1e-5
  )


def recurring(routing, sharing):
  def build(rngs):
    mixture = make(rngs, routing, sharing)
    return Group([decoder_block(CONFIG, rngs), mixture])

  return build


@functools.cache
def host(routing, sharing):
  return model(recurring(routing, sharing))


@pytest.mark.parametrize(("routing", "sharing"), KINDS)
def test_prefill_is_token_by_token_decoding(routing, sharing):
  deep = adjust(host(routing, sharing), 0.1)
  whole = jax.jit(lambda m: m(TOKENS, m.empty_cache(*TOKENS.shape)))(deep)
  logits, _, _, cache = decode(deep, TOKENS)
  np.testing.assert_allclose(
    logits, whole.logits[:, PROMPT:], rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(cache.pos, whole.cache.pos)
  np.testing.assert_allclose(cache.k, whole.cache.k, rtol=1e-4, atol=1e-5)
  holes = (np.asarray(cache.pos) < 0).mean()
  assert holes == 0 if sharing else 0 < holes < 1
  without = jax.jit(lambda m: m(TOKENS).logits)(deep)
  np.testing.assert_allclose(without, whole.logits, rtol=1e-4, atol=1e-5)


def test_sharing_keeps_one_cache_layer_instead_of_n():
  def slots(sharing):
    layers = 1 if sharing else N
    config = dataclasses.replace(CONFIG, layers=layers)
    build = lambda rngs: make(rngs, sharing=sharing)
    lm = DecoderLM(config, layer=build, rngs=nnx.Rngs(0))
    cache = lm(TOKENS, lm.empty_cache(*TOKENS.shape)).cache
    return cache.k.nbytes + cache.v.nbytes + cache.pos.nbytes

  assert N * slots(True) == slots(False)


@pytest.mark.parametrize(("routing", "sharing"), KINDS)
def test_the_future_changes_nothing(routing, sharing):
  other = X.at[:, T // 2 :].add(1.0)
  module = layer(routing, sharing)
  y, z = (run(module, x)[0] for x in (X, other))
  np.testing.assert_allclose(y[:, : T // 2], z[:, : T // 2], atol=1e-5)
  assert np.any(np.asarray(y) != np.asarray(z))


@pytest.mark.parametrize(("routing", "sharing"), KINDS)
def test_tokens_that_are_not_live_pass_and_are_not_seen(routing, sharing):
  live = jnp.broadcast_to(jnp.arange(T) % 3 > 0, X.shape[:2])
  bad = jnp.where(live[..., None], X, jnp.nan)
  call = jax.jit(lambda m, x: m(x, POSITIONS, None, 0, live)[0])
  module = adjust(layer(routing, sharing), 0.1)
  y, z = call(module, X), call(module, bad)
  np.testing.assert_array_equal(y[~live], X[~live])
  np.testing.assert_array_equal(y[live], z[live])


def test_task_and_predictor_learn_apart():
  task = jax.grad(lambda m: (run(m, training=True)[0] ** 2).sum())(layer())
  guess = jax.grad(lambda m: run(m, training=True)[3].penalty)(layer())
  moved = lambda tree: any(np.any(a) for a in jax.tree.leaves(tree))
  assert moved(task.router) and moved(task.block)
  assert not moved(task.predictor)
  assert moved(guess.predictor)
  assert not moved(guess.router) and not moved(guess.block)


@pytest.mark.parametrize(
  ("routing", "sharing"), [("expert", True), ("token", False)]
)
def test_gradients_are_finite_differences(routing, sharing):
  def loss(step):
    module = jax.tree.map(lambda a: a, layer(routing, sharing))
    for part in (
      module.router.outer.kernel,
      module.block.attention.key_value.kernel,
    ):
      noise = jax.random.normal(jax.random.key(3), part.get_value().shape)
      part.set_value(part.get_value() + step * noise)
    return jnp.sin(run(module, training=True)[0]).sum()

  slope = (loss(1e-3) - loss(-1e-3)) / 2e-3
  np.testing.assert_allclose(jax.grad(loss)(0.0), slope, rtol=2e-2)


@pytest.mark.parametrize(
  "wrong", [{"recursions": 0}, {"routing": "layer"}], ids=str
)
def test_refuses_settings_that_cannot_be(wrong):
  with pytest.raises(Exception, match=next(iter(wrong))):
    make(nnx.Rngs(0), **wrong)


def test_refuses_to_share_keys_of_several_layers():
  rngs = nnx.Rngs(0)
  group = Group([decoder_block(CONFIG, rngs)])
  with pytest.raises(ValueError, match=r"sharing.*Group"):
    MixtureOfRecursions(group, D, sharing=True, rngs=rngs)


def test_refuses_top_k_over_a_cache():
  deep = host("expert", False)
  with pytest.raises(ValueError, match="not causal"):
    deep(TOKENS, deep.empty_cache(*TOKENS.shape), key=KEY)
