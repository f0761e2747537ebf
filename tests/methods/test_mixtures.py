# SPDX-License-Identifier: Apache-2.0
"""Law: a mixture is the weighted sum of the experts that its router names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.methods.experts import (
  DeepSeekRouter,
  ExpertChoiceRouter,
  MixtralRouter,
  SwitchRouter,
  TopPRouter,
)
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import MixtureOfExperts, Mlp, stacked
from tests.methods.host import CONFIG, PROMPT, TOKENS, decode, shaken
from tests.methods.mixtures import (
  KEY,
  LIVE,
  B,
  D,
  E,
  F,
  T,
  X,
  brute_force,
  call,
  experts,
  gates_of,
  mixture,
  set_gate,
)

ROUTERS = {
  "switch": (SwitchRouter, {}),
  "mixtral": (MixtralRouter, {}),
  "deepseek": (DeepSeekRouter, {"top_k": 3, "groups": 2, "kept_groups": 2}),
  "top_p": (TopPRouter, {}),
  "expert_choice": (ExpertChoiceRouter, {}),
}
BY_TOKEN = sorted(set(ROUTERS) - {"expert_choice"})
every = pytest.mark.parametrize("name", ROUTERS)
by_token = pytest.mark.parametrize("name", BY_TOKEN)


def made(name, count=E):
  router, settings = ROUTERS[name]
  return mixture(router, count, **settings)


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@every
def test_the_output_is_the_weighted_sum(name):
  moe = made(name)
  routing = moe.router(X)
  gates = gates_of(routing)
  y, cost, signals = call(moe, X)
  close(y, brute_force(moe.experts, X, gates))
  chosen = np.asarray(routing.experts) >= 0
  assert cost.items == chosen.sum() and cost.dropped == 0
  (load,), (choices,) = signals.load, signals.choices
  np.testing.assert_array_equal(load, (gates > 0).sum((0, 1)))
  np.testing.assert_array_equal(choices, chosen.sum(-1))
  np.testing.assert_allclose(signals.share, chosen.sum() / (B * T * E))


@every
def test_identical_experts_are_one_layer(name):
  moe = made(name)
  same = jax.tree.map(lambda a: jnp.stack([a[0]] * E), moe.experts)
  moe = MixtureOfExperts(moe.router, same)
  one = jax.tree.map(lambda a: a[0], same)
  total = gates_of(moe.router(X)).sum(-1, keepdims=True)
  close(call(moe, X)[0], total * one.rows(X))


@every
def test_the_order_of_experts_does_not_matter(name):
  moe, order = made(name), np.random.default_rng(0).permutation(E)
  kernel = moe.router.gate.kernel.get_value()
  router = set_gate(moe.router, kernel[:, order])
  if name == "deepseek":  # whose groups are all kept here
    router.load_bias.set_value(router.load_bias.get_value()[order])
  other = jax.tree.map(lambda a: a[order], moe.experts)
  close(call(MixtureOfExperts(router, other), X)[0], call(moe, X)[0])


def steered(name, expert, by):
  """Tokens that all want, or all shun, an expert."""
  moe = made(name)
  kernel = moe.router.gate.kernel.get_value()
  kernel = kernel.at[0].set(0).at[0, expert].set(by)
  router = set_gate(moe.router, kernel)
  return MixtureOfExperts(router, moe.experts), X.at[..., 0].set(1)


@by_token
def test_all_tokens_may_want_one_expert(name):
  moe, x = steered(name, 2, 50.0)
  y, _, signals = call(moe, x)
  assert signals.load[0][2] == B * T
  close(y, brute_force(moe.experts, x, gates_of(moe.router(x))))


@by_token
def test_a_dead_expert_may_hold_anything(name):
  moe, x = steered(name, 2, -50.0)

  @jax.jit
  def loss(moe, x):
    y, _, signals = moe(x, None, KEY)
    return jnp.sin(y).sum() + signals.penalty, y

  def run(moe):
    return jax.grad(loss, has_aux=True)(moe, x)

  want_grads, want = run(moe)
  dead = jax.tree.map(lambda a: a.at[2].set(jnp.nan), moe.experts)
  grads, y = run(MixtureOfExperts(moe.router, dead))
  np.testing.assert_array_equal(y, want)
  for got, clean in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads)):
    np.testing.assert_array_equal(got, clean)
  for leaf in jax.tree.leaves(grads.experts):
    assert not np.any(leaf[2]) and np.any(leaf[3])


@every
def test_tokens_that_are_not_live_are_nobodys(name):
  moe = made(name)
  nan = jnp.where(LIVE[..., None], X, jnp.nan)
  y, cost, signals = call(moe, nan, LIVE)
  assert not np.any(y[~LIVE])
  for row, tokens in enumerate(LIVE.sum(1).tolist()):
    # as if they were not there
    alone = call(moe, X[row : row + 1, :tokens])
    close(y[row, :tokens], alone[0][0])
  (choices,) = signals.choices
  assert cost.items == choices[LIVE].sum() and not np.any(choices[~LIVE])


@every
def test_nobody_may_be_live(name):
  moe, none = made(name), jnp.zeros((B, T), bool)

  @jax.jit
  def loss(moe, x):
    y, cost, signals = moe(x, none, KEY)
    return jnp.sin(y).sum() + signals.penalty, (y, cost)

  grads, (y, cost) = jax.grad(loss, has_aux=True)(moe, X)
  assert not np.any(y) and cost.items == 0 and cost.capacity == 0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@every
def test_a_router_computes_in_f32(name):
  """Also of parameters and items of 16 bits, whose products it rounds once."""
  narrow = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
  wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
  router = narrow(made(name).router)
  got, want = router(narrow(X)), wide(router)(wide(narrow(X)))
  np.testing.assert_array_equal(got.experts, want.experts)
  assert got.weights.dtype == jnp.float32
  np.testing.assert_allclose(got.weights, want.weights, rtol=1e-6)


@every
def test_the_task_reaches_the_router_and_the_experts(name):
  grads = jax.jit(jax.grad(lambda m: jnp.sin(m(X, None, KEY)[0]).sum()))(
    made(name)
  )
  assert np.any(grads.router.gate.kernel.get_value())
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads.experts))


@every
def test_the_penalty_is_of_training_only(name):
  moe = made(name)
  assert call(moe, X)[2].penalty == 0
  penalty = call(moe, X, None, KEY)[2].penalty
  assert (penalty > 0) == (name != "expert_choice")


@every
def test_refuses_nan_and_other_counts(name):
  moe = made(name)
  with pytest.raises(ValueError, match="NaN"):
    moe(X.at[0, 3, 0].set(jnp.nan))
  with pytest.raises(ValueError, match="8 experts, but there are 7"):
    MixtureOfExperts(moe.router, experts(7))


@pytest.mark.parametrize(
  ("router", "settings"),
  [
    (SwitchRouter, {"experts": 0}),
    (MixtralRouter, {"experts": 4, "top_k": 5}),
    (MixtralRouter, {"experts": 4, "top_k": 0}),
    (DeepSeekRouter, {"experts": 4, "top_k": 5}),
    (TopPRouter, {"experts": 0}),
    (ExpertChoiceRouter, {"experts": 0}),
  ],
)
def test_refuses_more_choices_than_experts(router, settings):
  with pytest.raises(ValueError, match="experts"):
    router(D, **settings, rngs=nnx.Rngs(0))


def test_a_decoder_says_the_same_token_by_token():
  """With Switch Transformer too, whose capacity is that of training."""

  def layer(rngs):
    rule = SwitchRouter(D, E, rngs=rngs)
    return decoder_block(CONFIG, rngs, MixtureOfExperts(rule, experts()))

  model = shaken(DecoderLM(CONFIG, layer=layer, rngs=nnx.Rngs(0)))
  whole = jax.jit(lambda model, tokens: model(tokens))(model, TOKENS)
  logits, _, cost, _ = decode(model, TOKENS)
  close(logits, whole.logits[:, PROMPT:])
  assert cost.dropped == 0
  (load,) = whole.signals.load
  assert load.shape == (CONFIG.layers, E)


def test_one_expert_is_the_layer_itself():
  mlp = Mlp(D, F, rngs=nnx.Rngs(1))
  one = stacked(lambda rngs: mlp, 1, nnx.Rngs(0))
  for router in (
    SwitchRouter(D, 1, rngs=nnx.Rngs(0)),
    MixtralRouter(D, 1, top_k=1, rngs=nnx.Rngs(0)),
  ):
    close(call(MixtureOfExperts(router, one), X)[0], mlp.rows(X))
