# SPDX-License-Identifier: Apache-2.0
"""Law: FFN-SkipLLM is the plain model without the feed-forward layers that the
rule leaves out; attention and its keys are those of that model.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adaptivejax.decode import generate
from adaptivejax.methods.depth import MixtureOfDepths, ffn_skip
from adaptivejax.methods.width import AdaptiveComputationModule
from adaptivejax.models import decoder_block
from adaptivejax.nn import split_mlp
from tests import reference
from tests.methods.host import (
  CONFIG,
  PROMPT,
  TOKENS,
  assert_cache_holds,
  decode,
  model,
)

L = CONFIG.layers


def policy(threshold, **settings):
  settings = {k: jnp.asarray(v) for k, v in settings.items()}
  return Partial(ffn_skip, threshold=jnp.float32(threshold), **settings)


def cosine(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return (a * b).sum(-1) / norms


def replay(
  model, tokens, tau, cold_first=1, cold_last=1, budget=1.0, warm_up=0
):
  """`(skip bool[L, B, T], states)`, by the rule in words, token by token."""
  skip = np.zeros((L, *tokens.shape), bool)
  saturated = np.zeros(tokens.shape, bool)
  x, states = model.embedding.get_value()[tokens], []
  for l, module in enumerate(reference.layers_of(model)):
    h = reference.norm(module.norm_attention, x)
    h = x + reference.attention(module.attention, h)
    y = h + reference.mlp(module.mlp, reference.norm(module.norm_mlp, h))
    for b, t in np.ndindex(*tokens.shape):
      cold = l < cold_first or l >= L - cold_last or t < warm_up
      spent = skip[:, b, t].sum() + 1 > budget * L
      skip[l, b, t] = saturated[b, t] and not cold and not spent
    y = jnp.where(skip[l][..., None], h, y)
    saturated |= skip[l] | (cosine(h, y) >= tau)
    states.append(y)
    x = y
  return skip, states


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"cold_first": 0, "cold_last": 0},
    {"cold_first": 2},
    {"cold_last": 0, "budget": 0.25},
    {"cold_last": 0, "warm_up": 7},
  ],
  ids=str,
)
@pytest.mark.parametrize("tau", [0.7, 0.85])
def test_equals_the_replay(tau, settings):
  skip, states = replay(model(), TOKENS, tau, **settings)
  assert 0 < skip.sum() < skip.size, "the case decides nothing"
  stack = policy(tau, **settings)
  logits, depth, cost, cache = decode(model(), TOKENS, stack, stack)
  np.testing.assert_array_equal(depth, (L - skip.sum(0) / 2)[:, PROMPT:])
  want = reference.readout(model(), states[-1])[:, PROMPT:]
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)
  assert_cache_holds(cache, model(), TOKENS, states)
  # Items asked for: three per layer for attention, the readout, and what is
  # left of the feed-forward layers.
  decoded = TOKENS[:, PROMPT:].size
  fed = decoded * L - skip[..., PROMPT:].sum()
  assert cost.items - fed == decoded * (_attention_items() * L + 1)


def _attention_items():
  """Times that attention counts a token."""
  cost = decode(model(), TOKENS)[2]
  decoded = TOKENS[:, PROMPT:].size
  return (float(cost.items) / decoded - 1) / L - 1


@pytest.mark.parametrize(
  "settings",
  [{"tau": 1.1}, {"tau": 0.0, "warm_up": 99}, {"tau": 0, "budget": 0}],
)
def test_never_skipping_is_plain_decoding_bit_by_bit(settings):
  stack = policy(settings.pop("tau"), **settings)
  plain, never = decode(model(), TOKENS), decode(model(), TOKENS, stack)
  np.testing.assert_array_equal(never[0], plain[0])
  np.testing.assert_array_equal(never[1], plain[1])
  jax.tree.map(np.testing.assert_array_equal, never[3], plain[3])
  np.testing.assert_allclose(never[2].share, 1)


def test_settings_share_a_trace():
  run = jax.jit(lambda p: model()(TOKENS, stack=p).depth)
  for tau, budget, cold in [(0.5, 0.2, 1), (1.1, 1.0, 0), (0.9, 0.5, 2)]:
    run(policy(tau, budget=budget, cold_first=cold))
  assert run._cache_size() == 1


def test_layers_in_training_draw_their_own_noise():
  """The key is split over the layers, as in the plain stack."""

  def layer(rngs):
    block = decoder_block(CONFIG, rngs)
    learners = split_mlp(block.mlp, 4)
    acm = AdaptiveComputationModule(learners, CONFIG.features, rngs=rngs)
    return decoder_block(CONFIG, rngs, acm)

  key = jax.random.key(1)
  plain = model(layer)(TOKENS, key=key)
  never = model(layer)(TOKENS, stack=policy(1.1), key=key)
  np.testing.assert_allclose(never.logits, plain.logits, rtol=1e-5, atol=1e-5)


def test_refuses_layers_without_halves():
  def layer(rngs):
    block = decoder_block(CONFIG, rngs)
    return MixtureOfDepths(block, CONFIG.features, rngs=rngs)

  with pytest.raises(ValueError, match=r"ffn_skip.*Block"):
    generate(model(layer), TOKENS, steps=2, policy=policy(0.5))
