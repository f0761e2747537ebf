# SPDX-License-Identifier: Apache-2.0
"""Law: decoding step by step says what one full forward pass says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.decode import POLICIES, generate, make_policy, score
from adaptivejax.models import DecoderConfig, DecoderLM
from tests import reference

V, P, STEPS = 13, 4, 5
CONFIG = DecoderConfig(
  vocab=V, layers=3, features=16, hidden=32, heads=2, kv_heads=1
)
MODEL = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
TEXT = jax.random.randint(jax.random.key(0), (3, P + STEPS), 0, V)


def test_greedy_is_repeated_full_forward():
  made = generate(MODEL, TEXT[:, :P], steps=STEPS)
  text = TEXT[:, :P]
  for _ in range(STEPS):
    logits = reference.decoder(MODEL, text)[:, -1]
    text = jnp.concatenate([text, logits.argmax(-1)[:, None]], 1)
  np.testing.assert_array_equal(made.tokens, text[:, P:])
  np.testing.assert_array_equal(made.depth, CONFIG.layers)
  np.testing.assert_allclose(made.cost.share, 1)


@pytest.mark.parametrize("prompt", [1, P])
def test_score_is_the_parallel_loss(prompt):
  out = score(MODEL, TEXT, prompt=prompt)
  odds = jax.nn.log_softmax(reference.decoder(MODEL, TEXT[:, :-1]))
  nats = -jnp.take_along_axis(odds, TEXT[:, 1:, None], -1)[..., 0]
  np.testing.assert_allclose(
    out.nats, nats[:, prompt - 1 :], rtol=1e-4, atol=1e-5
  )
  assert out.shares.shape == (P + STEPS - prompt, CONFIG.layers)


def test_sampling_follows_the_model():
  prompt = jnp.tile(TEXT[:1, :P], (4000, 1))
  made = generate(
    MODEL, prompt, steps=1, temperature=0.7, key=jax.random.key(1)
  )
  odds = jax.nn.softmax(reference.decoder(MODEL, TEXT[:1, :P])[0, -1] / 0.7)
  seen = np.bincount(np.asarray(made.tokens[:, 0]), minlength=V) / 4000
  assert 0.5 * np.abs(seen - odds).sum() < 0.05, "total variation"


def test_sampling_is_a_function_of_the_key():
  draw = lambda seed: (
    generate(
      MODEL, TEXT[:, :P], steps=STEPS, temperature=1.0, key=jax.random.key(seed)
    ).tokens
  )
  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(0) != draw(1)).any()


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_by_name_decodes(name):
  made = generate(MODEL, TEXT[:, :P], steps=2, policy=make_policy(name, MODEL))
  assert made.tokens.shape == (3, 2)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: generate(MODEL, TEXT[:, :0], steps=1), "at least one"),
    (lambda: generate(MODEL, TEXT[:0], steps=1), "at least one"),
    (lambda: generate(MODEL, TEXT, steps=0), "at least 1 token"),
    (lambda: generate(MODEL, TEXT + V, steps=1), "vocabulary"),
    (lambda: generate(MODEL, TEXT, steps=1, temperature=-1.0), "greedy"),
    (lambda: generate(MODEL, TEXT, steps=1, temperature=1.0), "key"),
    (lambda: score(MODEL, TEXT, prompt=P + STEPS), "must leave tokens"),
    (lambda: score(MODEL, TEXT, prompt=0), "must leave tokens"),
    (lambda: make_policy("clam", MODEL), "calm"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
