# SPDX-License-Identifier: Apache-2.0
"""Law: a module computes its live items, and nothing else moves them.

What the modules mean is `tests.reference`, held against whole models in
`tests/models`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.models import DecoderConfig, decoder_block
from adaptivejax.nn import (
  Attention,
  LayerNorm,
  Mlp,
  RMSNorm,
  Router,
  Setting,
  adjust,
)
from tests import reference

D, T = 16, 8
X = jax.random.normal(jax.random.key(0), (2, T, D))
POSITIONS = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
LIVE = jnp.arange(T) % jnp.array([[2], [3]]) == 0
NAN = jnp.where(LIVE[..., None], X, jnp.nan)
CONFIG = DecoderConfig(layers=1, features=D, hidden=32, heads=4, kv_heads=2)


def test_a_block_passes_dead_tokens_and_never_reads_them():
  block = decoder_block(CONFIG, nnx.Rngs(0))
  y, _, cost, _ = block(NAN, POSITIONS, live=LIVE)
  want = reference.block(block, X, np.asarray(LIVE))
  np.testing.assert_allclose(
    np.asarray(y)[LIVE], np.asarray(want)[LIVE], rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(
    np.asarray(block(X, POSITIONS, live=LIVE)[0])[~LIVE], X[~LIVE]
  )
  assert cost.spent < block(X, POSITIONS)[2].spent


def test_gradients_of_a_block_never_read_dead_tokens():
  def loss(block, x):
    y = block(x, POSITIONS, live=LIVE)[0]
    return jnp.sin(jnp.where(LIVE[..., None], y, 0)).sum()

  grad = jax.grad(loss, argnums=(0, 1))
  block = decoder_block(CONFIG, nnx.Rngs(0))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    grad(block, NAN),
    grad(block, X),
  )


@pytest.mark.parametrize("gated", [False, True])
def test_a_feed_forward_layer_gives_zero_elsewhere(gated):
  mlp = Mlp(D, 32, gated=gated, rngs=nnx.Rngs(0))
  y, _, signals = mlp(NAN, LIVE)
  want = np.where(LIVE[..., None], reference.mlp(mlp, X), 0)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  assert signals.share == 1 and signals.penalty == 0


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms(norm):
  module = norm(D)
  module.scale.set_value(jnp.arange(D) / D)
  x = np.asarray(X, np.float64) * 3 + 1
  if norm is LayerNorm:
    module.bias.set_value(jnp.arange(D) / 7)
    want = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    want = want * np.arange(D) / D + np.arange(D) / 7
  else:
    want = x / np.sqrt((x**2).mean(-1, keepdims=True)) * np.arange(D) / D
  np.testing.assert_allclose(
    module(jnp.asarray(x, jnp.float32)), want, rtol=1e-4, atol=1e-5
  )
  half = module(X.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16


def test_adjust_sets_every_setting_of_a_copy():
  class Both(nnx.Module):
    def __init__(self):
      self.a = Setting(jnp.zeros(3))
      self.b = nnx.List([Setting(jnp.zeros(()))])
      self.weight = nnx.Param(jnp.ones(2))

  module = Both()
  changed = adjust(module, 0.5)
  assert (changed.a.get_value() == 0.5).all()
  assert changed.b[0].get_value() == 0.5
  assert (changed.weight.get_value() == 1).all()
  assert not module.a.get_value().any()


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda r: Attention(16, 3, rngs=r), "heads"),
    (lambda r: Attention(16, 0, rngs=r), "heads"),
    (lambda r: Attention(16, 4, 0, rngs=r), "kv_heads"),
    (lambda r: Attention(0, 1, rngs=r), "features"),
    (lambda r: Attention(16, 4, 3, rngs=r), "kv_heads"),
    (lambda r: Attention(12, 4, rngs=r), "even width"),
    (lambda r: Router(16, 0, rngs=r), "choices"),
    (lambda r: Router(16, hidden=0, rngs=r), "hidden"),
    (lambda r: Mlp(16, 0, rngs=r), "features_out=0"),
    (lambda r: Mlp(-1, 8, rngs=r), "features"),
    (lambda r: adjust(Mlp(16, 32, rngs=r), 1.0), "Setting"),
    (lambda r: RMSNorm(0), "features"),
    (lambda r: LayerNorm(0), "features"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call(nnx.Rngs(0))
