# SPDX-License-Identifier: Apache-2.0
"""Law: a text goes on with the neurons that its prompt's tokens nominated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from adaptivejax.decode import generate, score
from adaptivejax.methods.experts import FactorLLM
from adaptivejax.methods.width import CoreInfer, core_of
from adaptivejax.methods.width.core_infer import nominate
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Mlp, adjust, by_neurons, gather_neurons
from tests.methods.host import shaken

B, P, F = 2, 6, 24
CONFIG = DecoderConfig(
  vocab=13, layers=4, features=16, hidden=F, heads=2, kv_heads=1, gated=True
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (B, 10)))


@functools.cache
def model(gated=True):
  config = dataclasses.replace(CONFIG, gated=gated)
  return shaken(DecoderLM(config, rngs=nnx.Rngs(0)))


def votes_by_hand(z, token_share, k):
  """Loops over tokens and neurons; the first wins a tie."""
  many = int(np.floor(token_share * np.mean([(row > 0).sum() for row in z])))
  votes = [0] * z.shape[1]
  for row in z:
    for i in sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[:many]:
      votes[i] += 1
  best = sorted(range(len(votes)), key=lambda i: (-votes[i], i))[:k]
  return sorted(best)


@pytest.mark.parametrize("token_share", [0.1, 0.4, 1.0])
def test_the_core_is_what_most_tokens_nominate(token_share):
  z = np.random.default_rng(3).normal(size=(7, 20)).astype(np.float32)
  z[:, 4] = z[:, 9] = 0.5  # ties
  for k in (1, 8, 20):
    got = nominate(jnp.asarray(z), jnp.ones(7, bool), token_share, k)
    np.testing.assert_array_equal(got, votes_by_hand(z, token_share, k))


def test_padding_nominates_nothing():
  z = np.random.default_rng(4).normal(size=(7, 20)).astype(np.float32)
  real = np.arange(7) < 4
  z[4:] = 1e3
  got = nominate(jnp.asarray(z), jnp.asarray(real), 0.4, 6)
  np.testing.assert_array_equal(got, votes_by_hand(z[:4], 0.4, 6))


def test_the_core_of_a_padded_prompt_is_its_own():
  lengths = jnp.array([4, 6])
  both = core_of(model(), TOKENS[:, :P], lengths)
  alone = core_of(model(), TOKENS[:1, :4])
  np.testing.assert_array_equal(both.chosen[0], alone.chosen[0])
  assert both.chosen.shape == (B, 2, int(0.4 * F))


def without(mlp, chosen):
  """The layer with the other neurons' output weights at zero."""
  gone = np.setdiff1d(np.arange(F), chosen)
  mlp.down.kernel.set_value(mlp.down.kernel.get_value().at[gone].set(0.0))
  return mlp


@pytest.mark.parametrize("gated", [True, False])
def test_decoding_runs_the_core_and_nothing_else(gated):
  whole, row = model(gated), TOKENS[:1]
  core = core_of(whole, row[:, :P], cold_first=1, cold_last=2, share=0.5)
  thin = jax.tree.map(lambda a: a, whole)
  cut = without(
    jax.tree.map(lambda a: a[1], thin.layers.mlp), core.chosen[0, 0]
  )
  thin.layers.mlp = jax.tree.map(
    lambda a, b: a.at[1].set(b), thin.layers.mlp, cut
  )
  cache = whole(row[:, :P], whole.empty_cache(1, 10)).cache
  stack = Partial(by_neurons, neurons=core, first=1)
  for t in range(P, 10):
    one = row[:, t : t + 1]
    want = thin(one, cache)
    got = whole(one, cache, stack=stack)
    np.testing.assert_allclose(got.logits, want.logits, rtol=0, atol=1e-5)
    cache = want.cache
  assert got.cost.spent < want.cost.spent
  assert got.shares[1] < got.shares[0] == 1.0


def test_the_whole_core_is_the_model():
  policy = CoreInfer(share=1.0, token_share=1.0)
  want = generate(model(), TOKENS[:, :P], steps=6)
  got = generate(model(), TOKENS[:, :P], steps=6, policy=policy)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_allclose(got.cost.spent, want.cost.spent, rtol=1e-3)


def test_the_policy_is_its_stack_with_the_prompts_core():
  policy = CoreInfer(share=0.25)
  out = generate(model(), TOKENS[:1, :P], steps=4, policy=policy)
  core = core_of(model(), TOKENS[:1, :P], share=0.25)
  text = jnp.concatenate([TOKENS[:1, :P], out.tokens], axis=1)
  stack = Partial(by_neurons, neurons=core, first=1)
  read = score(model(), text, prompt=P, policy=stack)
  assert out.cost.share < 1
  said = [int(read_greedy(stack, text, t)) for t in range(P + 1, P + 4)]
  np.testing.assert_array_equal(said, out.tokens[0, 1:])
  assert np.isfinite(np.asarray(read.nats)).all()


def read_greedy(stack, text, t):
  """The likeliest token after the first `t`, read one by one."""
  cache = model().empty_cache(1, 12)
  out = model()(text[:, :P], cache)
  for i in range(P, t):
    out = model()(text[:, i : i + 1], out.cache, stack=stack)
  return out.logits[0, -1].argmax()


def test_rows_have_cores_of_their_own():
  policy = CoreInfer(share=0.25)
  both = generate(model(), TOKENS[:, :P], steps=5, policy=policy)
  for b in range(B):
    one = generate(model(), TOKENS[b : b + 1, :P], steps=5, policy=policy)
    np.testing.assert_array_equal(both.tokens[b], one.tokens[0])


@pytest.mark.parametrize(
  "settings, word",
  [
    ({"share": 0.0}, "share"),
    ({"token_share": 1.5}, "token_share"),
    ({"cold_first": 3, "cold_last": 1}, "cold_first"),
    ({"cold_last": -1}, "cold_last"),
  ],
)
def test_bad_settings(settings, word):
  with pytest.raises(ValueError, match=word):
    core_of(model(), TOKENS[:, :P], **settings)


def test_biases_are_refused():
  whole = Mlp(16, F, bias=True, rngs=nnx.Rngs(0))
  stacked = jax.tree.map(lambda a: a[None], whole)
  with pytest.raises(ValueError, match="biases"):
    gather_neurons(stacked, jnp.zeros((1, 1, 2), int))


def test_other_layers_are_refused():
  layer = lambda rngs: decoder_block(
    CONFIG,
    rngs,
    mlp=FactorLLM(Mlp(16, F, rngs=rngs), 2, top_k=1, rngs=rngs),
  )
  other = DecoderLM(CONFIG, layer=layer, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="Mlp"):
    core_of(adjust(other, 0.0), TOKENS)
