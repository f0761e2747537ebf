# SPDX-License-Identifier: Apache-2.0
"""Law: with a window, what is out of it might as well not be there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.nn import Attention, Look, Window, with_look
from tests import reference

T, SPAN = 9, 3
SHAPE = {"vocab": 13, "layers": 2, "features": 16, "hidden": 24, "heads": 4}
CONFIG = DecoderConfig(**SHAPE, kv_heads=2, window=SPAN)
TOKENS = jax.random.randint(jax.random.key(0), (2, T), 0, 13)


@pytest.fixture(scope="module")
def model():
  return DecoderLM(CONFIG, rngs=nnx.Rngs(0))


def test_equals_the_reference(model):
  at = np.arange(T)
  pairs = at[None] > at[:, None] - SPAN
  want = reference.decoder(model, TOKENS, pairs=pairs)
  got = model(TOKENS).logits
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  cache, logits = model.empty_cache(2, T), []
  for n in range(T):
    out = model(TOKENS[:, n : n + 1], cache)
    cache, logits = out.cache, [*logits, out.logits]
  logits = jnp.concatenate(logits, 1)
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)


def test_a_tree_of_drafts(model):
  past = model(TOKENS[:, :5], model.empty_cache(2, T)).cache
  sees = jnp.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).astype(bool)
  tree = jnp.broadcast_to(sees, (2, 3, 3))
  out = model(TOKENS[:, 5:8], past, tree=tree)
  text = jnp.concatenate([TOKENS[:, :6], TOKENS[:, 7:8]], 1)
  np.testing.assert_allclose(
    out.logits[:, 2], model(text).logits[:, -1], rtol=1e-4, atol=1e-5
  )


def test_another_look_would_look_beyond(model):
  with pytest.raises(ValueError, match="window of 3 tokens"):
    with_look(model, Look())
  wide = with_look(model, Window(T))
  free = DecoderLM(
    DecoderConfig(**SHAPE, kv_heads=2), rngs=nnx.Rngs(0)
  )  # the same weights
  np.testing.assert_array_equal(wide(TOKENS).logits, free(TOKENS).logits)
  assert (wide(TOKENS).logits != model(TOKENS).logits).any()


def test_bad_input():
  with pytest.raises(ValueError, match="span=0"):
    Window(0)
  with pytest.raises(ValueError, match="even width"):
    Attention(16, 4, width=3, rngs=nnx.Rngs(0))
