# SPDX-License-Identifier: Apache-2.0
"""Kernels as [O, I]: the same model, and no step that copies them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptivejax.decode import generate
from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.nn import OutMajor, out_major
from adaptivejax.nn.linear import linear
from tests.methods.host import shaken

CONFIG = DecoderConfig(
  vocab=13,
  layers=2,
  features=16,
  hidden=24,
  heads=2,
  kv_heads=1,
  gated=True,
  tied=False,
)
PROMPT = jnp.arange(6).reshape(2, 3)


@functools.cache
def model():
  return shaken(DecoderLM(CONFIG, rngs=nnx.Rngs(0)))


def test_it_is_the_same_linear_map():
  for bias in (False, True):
    layer = shaken(linear(3, 5, rngs=nnx.Rngs(0), bias=bias))
    turned, x = OutMajor(layer), jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(turned(x), layer(x), rtol=1e-6)
    np.testing.assert_array_equal(turned.kernel.get_value(), layer.kernel)


def test_it_is_the_same_model():
  before = jax.tree.map(np.array, model())
  turned = out_major(model())
  shapes = jax.tree.map(jnp.shape, jax.tree.leaves(turned))
  assert (2, 24, 16) in shapes and (2, 13) not in shapes
  np.testing.assert_allclose(
    turned(PROMPT).logits, model()(PROMPT).logits, rtol=0, atol=1e-5
  )
  a, b = (generate(m, PROMPT, steps=5).tokens for m in (turned, model()))
  np.testing.assert_array_equal(a, b)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(model())):
    np.testing.assert_array_equal(a, b)  # itself it stays


def kernels_made(model):
  """Lines of a decoding step that make a kernel out of the stack."""
  cache = model.empty_cache(1, 8)
  step = jax.jit(lambda m, t, c: m(t, c).logits)
  text = step.lower(model, PROMPT[:1, :1], cache).compile().as_text()
  shape = re.compile(r" = f32\[(1,)?(96,64|64,96)\]")
  found, fused = [], False
  for line in text.splitlines():
    if line.endswith("{"):
      fused = "fused_computation" in line
    elif shape.search(line) and not fused:
      found.append(line)
  return found


def test_a_step_of_decoding_copies_no_kernel():
  wide = DecoderConfig(
    vocab=13, layers=3, features=64, hidden=96, heads=2, kv_heads=1, gated=True
  )
  model = DecoderLM(wide, rngs=nnx.Rngs(0))
  if jax.default_backend() == "cpu":
    assert kernels_made(model)  # else there would be nothing to mend
  assert not kernels_made(out_major(model))
