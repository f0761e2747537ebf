# SPDX-License-Identifier: Apache-2.0
"""Law: what ReLU cuts off was zero, so leaving it out changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.router_losses import (
  activation_locality,
  chunk_sparsification,
)
from adaptivejax.methods.experts import BlockFFN
from adaptivejax.models import decoder_block
from adaptivejax.nn import adjust
from tests.methods.host import CONFIG, PROMPT, TOKENS, decode, model, shaken
from tests.methods.mixtures import call

B, T, D, F, E = 2, 11, 16, 4, 6
X = jax.random.normal(jax.random.key(0), (B, T, D))
KEY = jax.random.key(1)


@functools.cache
def module():
  return shaken(BlockFFN(D, F, E, chunk=4, rngs=nnx.Rngs(0)))


def numpy_of(block):
  """`(gate, scale, up, down)` in f64."""
  weights = (
    block.gate.kernel,
    block.scale,
    block.experts.up.kernel,
    block.experts.down.kernel,
  )
  return [np.asarray(w.get_value(), np.float64) for w in weights]


def by_hand(block, x, level=0.0):
  """`(y, active, scores)`, token by token."""
  gate, scale, up, down = numpy_of(block)
  rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
  y, active, scores = np.zeros_like(rows), [], []
  for n, row in enumerate(rows):
    s = np.maximum(row @ gate, 0)
    a = s / np.sqrt((s * s).mean() + 1e-6)
    scores.append(s)
    active.append(a > level)
    for i in np.flatnonzero(a > level):
      h = row @ up[i]
      y[n] += a[i] * scale[i] * (h / (1 + np.exp(-h))) @ down[i]
  fold = lambda a: np.reshape(a, (*x.shape[:-1], -1))
  return fold(y), fold(active), fold(scores)


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("tokens", [1, 3, 4, T])
def test_equals_a_loop_over_tokens_and_experts(tokens, level):
  """A few tokens go by the union of their experts, more by the dispatch."""
  block, x = adjust(module(), level), X[:, :tokens]
  want, active, _ = by_hand(block, x, level)
  assert 0 < active.mean() < 1
  for key in (None, KEY):
    y, _, signals = call(block, x, None, key)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(signals.share, active.mean(), rtol=1e-6)
    np.testing.assert_array_equal(signals.load[0], active.sum((0, 1)))
    np.testing.assert_array_equal(signals.choices[0], active.sum(-1))


def test_all_experts_are_one_wide_layer():
  """Nothing cut off, it is one SiLU layer, its neurons scaled in blocks."""
  gate, scale, up, down = numpy_of(module())
  x = np.asarray(X, np.float64)
  s = np.maximum(x @ gate, 0)
  weights = s / np.sqrt((s * s).mean(-1, keepdims=True) + 1e-6) * scale
  hidden = x @ up.transpose(1, 0, 2).reshape(D, E * F)
  hidden = hidden / (1 + np.exp(-hidden)) * np.repeat(weights, F, axis=-1)
  want = hidden @ down.reshape(E * F, D)
  for x in (X, X[:, :2]):
    y, cost, _ = call(adjust(module(), -1.0), x)
    np.testing.assert_allclose(y, want[:, : x.shape[1]], rtol=1e-4, atol=1e-5)
    assert cost.items == E * x[..., 0].size


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_few_tokens_read_each_expert_of_their_union_once(tokens):
  x = X.reshape(1, -1, D)[:, :tokens]
  _, active, _ = by_hand(module(), x)
  cost = call(module(), x)[1]
  union = active.any((0, 1)).sum()
  assert union < E or tokens == 8
  assert cost.items == active.sum()
  assert cost.capacity == tokens * union
  asked = 2 * tokens * D * E
  np.testing.assert_allclose(cost.spent - asked, 4 * D * F * tokens * union)
  np.testing.assert_allclose(cost.full, 4 * D * F * E * tokens)


def test_training_and_inference_have_the_same_gradients():
  loss = lambda m, x, key: (jnp.sin(m(x, None, key)[0]) ** 2).sum()
  grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
  plain = shaken(BlockFFN(D, F, E, sparsity=0, locality=0, rngs=nnx.Rngs(0)))
  sparse, dense = grad(plain, X, None), grad(plain, X, KEY)
  for a, b in zip(*map(jax.tree.leaves, (sparse, dense))):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  assert np.abs(sparse[0].gate.kernel.get_value()).max() > 0.01


def test_a_token_without_experts_gets_zero_and_no_gradient_is_nan():
  gate = module().gate.kernel.get_value()
  away = jnp.linalg.lstsq(gate.T, -jnp.ones(E))[0]  # all logits are -1
  x = X[:, :3].at[0, 1].set(away)
  y, _, signals = call(module(), x)
  assert signals.choices[0][0, 1] == 0 and not np.any(y[0, 1])
  for key in (None, KEY):
    grads = jax.grad(lambda m, k=key: m(x, None, k)[0].sum())(module())
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(grads))


def test_tokens_that_are_not_live_use_nothing():
  live = jnp.arange(T) % 3 == jnp.zeros((B, 1), jnp.int32)
  nan = jnp.where(live[..., None], X, jnp.nan)
  for key in (None, KEY):
    y, _, signals = call(module(), nan, live, key)
    want = call(module(), X, None, key)[0]
    np.testing.assert_allclose(
      y, np.where(live[..., None], want, 0), rtol=1e-5, atol=1e-6
    )
    assert np.isfinite(signals.penalty)
    assert not np.any(np.asarray(signals.choices[0])[~np.asarray(live)])


def _layer(rngs):
  return decoder_block(CONFIG, rngs, BlockFFN(16, 4, E, rngs=rngs))


def test_a_decoder_says_the_same_token_by_token():
  """Decoding goes by the union, training's text by the dispatch."""
  made = model(_layer)
  logits, _, cost, _ = decode(made, TOKENS)
  want = jax.jit(lambda m, t: m(t).logits)(made, TOKENS)[:, PROMPT:]
  np.testing.assert_allclose(logits, want, rtol=1e-3, atol=1e-5)
  assert cost.spent < cost.full


def test_the_penalty_is_both_losses_in_training_only():
  block, gate = module(), numpy_of(module())[0]
  _, _, s = by_hand(block, X)
  sparse = chunk_sparsification(jnp.asarray(s, jnp.float32), 4)
  local = activation_locality(jnp.asarray(100 * np.asarray(X) @ gate))
  want = 5e-2 * sparse + 2e-3 * local
  np.testing.assert_allclose(
    call(block, X, None, KEY)[2].penalty, want, rtol=1e-4
  )
  assert call(block, X)[2].penalty == 0


@pytest.mark.parametrize(
  ("settings", "word"), [({"chunk": 0}, "chunk"), ({"experts": 0}, "least")]
)
def test_refuses_what_cannot_be(settings, word):
  sizes = {"features": D, "hidden": F, "experts": E} | settings
  with pytest.raises(ValueError, match=word):
    BlockFFN(**sizes, rngs=nnx.Rngs(0))
