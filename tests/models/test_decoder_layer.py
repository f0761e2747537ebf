# SPDX-License-Identifier: Apache-2.0
"""Law: methods serve a decoder with every switch turned.

That such decoders are what they should be: `tests/io/test_parity.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core import Rope
from adaptivejax.methods.attention import NSA
from adaptivejax.methods.kv import StreamingLLM
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Attention, Mlp, RMSNorm, split_mlp, with_look
from adaptivejax.nn.mlp import join_mlp

T = 9
TOKENS = jax.random.randint(jax.random.key(0), (2, T), 0, 13)
CONFIG = DecoderConfig(
  vocab=13,
  layers=2,
  features=16,
  hidden=24,
  heads=4,
  kv_heads=2,
  gated=True,
  tied=False,
  head_width=6,
  activation="gelu",
  rope=Rope(20.0, 2.0),
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  norm_heads=True,
  norm_epsilon=1e-2,
  norm_offset=1.0,
  embedding_scale=4.0,
)


def shaken(model):
  """With parameters that are neither 0 nor 1."""
  leaves, tree = jax.tree.flatten(model)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noise = lambda a, k: a + 0.2 * jax.random.normal(k, a.shape)
  return jax.tree.unflatten(tree, map(noise, leaves, keys))


@pytest.fixture(scope="module")
def model():
  return shaken(DecoderLM(CONFIG, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("rope", Rope(20.0)),
    ("activation", "silu"),
    ("norm_epsilon", 1e-6),
    ("norm_offset", 0.0),
    ("embedding_scale", 1.0),
    ("window", 2),
  ],
)
def test_each_switch_counts(model, field, value):
  """The same weights under another config say something else."""
  other = DecoderLM(
    dataclasses.replace(CONFIG, **{field: value}), rngs=nnx.Rngs(0)
  )
  leaves = jax.tree.leaves(model)
  other = jax.tree.unflatten(jax.tree.structure(other), leaves)
  far = abs(other(TOKENS).logits - model(TOKENS).logits).max()
  assert far > 1e-3


def test_a_look_turns_keys_as_the_model_does(model):
  """With all in its window, StreamingLLM says what the model says."""
  wide = with_look(model, StreamingLLM(2, 16))
  want = model(TOKENS).logits
  np.testing.assert_allclose(wide(TOKENS).logits, want, rtol=1e-4, atol=1e-4)
  cache, logits = wide.empty_cache(2, T), []
  for n in range(T):
    out = wide(TOKENS[:, n : n + 1], cache)
    cache, logits = out.cache, [*logits, out.logits]
  logits = jnp.concatenate(logits, 1)
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


def test_heads_of_another_width():
  sizes = {"size": 4, "stride": 2, "block": 4, "blocks": 3, "window": 8}
  look = lambda rngs: NSA(16, 4, width=6, **sizes, rngs=rngs)
  layer = lambda rngs: decoder_block(CONFIG, rngs, look=look(rngs))
  model = DecoderLM(CONFIG, layer=layer, rngs=nnx.Rngs(0))
  assert jnp.isfinite(model(TOKENS).logits).all()
  assert model.empty_cache(2, T).k.shape[-1] == 6
  with pytest.raises(ValueError, match="heads=3"):
    NSA(16, 3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("gated", [False, True])
def test_parts_of_a_layer_with_biases_sum_to_it(gated):
  mlp = shaken(Mlp(8, 12, gated=gated, bias=True, rngs=nnx.Rngs(0)))
  x = jax.random.normal(jax.random.key(2), (5, 8))
  shuffled = np.random.default_rng(0).permutation(12)
  for order in (None, shuffled):
    parts = split_mlp(mlp, 4, order)
    each = jax.vmap(lambda m: m.rows(x))(parts)
    near = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(each.sum(0), mlp.rows(x), **near)
    np.testing.assert_allclose(join_mlp(parts).rows(x), mlp.rows(x), **near)
  with pytest.raises(ValueError, match="no bias"):
    mlp.rows(x, jnp.matmul)


def test_a_scale_around_zero_is_the_same_scale():
  x = jax.random.normal(jax.random.key(3), (5, 8))
  plain, offset = RMSNorm(8), RMSNorm(8, offset=1.0)
  np.testing.assert_array_equal(plain(x), offset(x))
  assert (offset.scale.get_value() == 0).all()


def test_norms_of_heads_come_before_positions():
  """The norm of a head does not see how it was turned."""
  attention = Attention(16, 4, norm=RMSNorm, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(4), (1, 3, 16))
  scale = 1 + jnp.arange(4.0)
  attention.norm_key.scale.set_value(scale)
  k, v = attention.keys(x, jnp.zeros((1, 3), jnp.int32))
  turned, same = attention.keys(x, jnp.full((1, 3), 5))
  length = lambda a: jnp.hypot(a[..., :2], a[..., 2:])  # of each pair
  np.testing.assert_allclose(length(k), length(turned), rtol=1e-5)
  np.testing.assert_allclose(((k / scale) ** 2).mean(-1), 1, rtol=1e-4)
  np.testing.assert_array_equal(v, same)


@pytest.mark.parametrize("activation", ["swish", ""])
def test_bad_input(activation):
  with pytest.raises(ValueError, match="activation"):
    dataclasses.replace(CONFIG, activation=activation)
