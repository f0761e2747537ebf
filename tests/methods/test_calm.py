# SPDX-License-Identifier: Apache-2.0
"""Law: CALM is the plain model, each token stopped at its own first sure layer.

The oracle replays decoding one token at a time, without a cache: it tries all
layers, finds the exit, and lets the exit state stand in for all deeper layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adaptivejax.decode import generate
from adaptivejax.methods.depth import MixtureOfDepths, calm, exit_confidence
from adaptivejax.models import decoder_block
from adaptivejax.nn import Group, every_layer
from tests import reference
from tests.methods.host import (
  CONFIG,
  PROMPT,
  TOKENS,
  B,
  T,
  assert_cache_holds,
  decode,
  model,
)

L = CONFIG.layers


def policy(threshold, min_depth=1):
  return Partial(
    calm, threshold=jnp.float32(threshold), min_depth=jnp.int32(min_depth)
  )


def replay(model, tokens, threshold, min_depth):
  """`(exits i32[B, T], states)`; the prompt runs all layers."""
  exits, states = np.full(tokens.shape, L), []
  for t in range(PROMPT, tokens.shape[1]):
    seen = np.ones((L, *tokens[:, : t + 1].shape), bool)
    states = reference.hidden(
      model, tokens[:, : t + 1], _live(exits[:, : t + 1]), seen
    )
    logits = [reference.readout(model, h[:, t]) for h in states]
    sure = np.array([jax.nn.softmax(a).max(-1) for a in logits]) >= threshold
    sure[: min_depth - 1], sure[-1] = False, True
    exits[:, t] = sure.argmax(0) + 1
  seen = np.ones((L, *tokens.shape), bool)
  return exits, reference.hidden(model, tokens, _live(exits), seen)


def _live(exits):
  return np.arange(L)[:, None, None] < exits


@pytest.mark.parametrize(
  ("threshold", "min_depth"), [(0.3, 1), (0.35, 1), (0.3, 3), (0.45, 2)]
)
def test_equals_the_replay(threshold, min_depth):
  exits, states = replay(model(), TOKENS, threshold, min_depth)
  logits, depth, _, cache = decode(
    model(), TOKENS, policy(threshold, min_depth)
  )
  exits = exits[:, PROMPT:]
  assert len(np.unique(exits)) > 1, "the case decides nothing"
  np.testing.assert_array_equal(depth, exits)
  want = reference.readout(model(), states[-1])[:, PROMPT:]
  np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)
  assert_cache_holds(cache, model(), TOKENS, states)


def test_above_one_it_is_plain_decoding_bit_by_bit():
  plain = decode(model(), TOKENS)
  never = decode(model(), TOKENS, policy(1.1))
  np.testing.assert_array_equal(never[0], plain[0])
  np.testing.assert_array_equal(never[1], plain[1])
  jax.tree.map(np.testing.assert_array_equal, never[3], plain[3])
  made = [
    generate(model(), TOKENS[:, :PROMPT], steps=4, policy=p).tokens
    for p in (policy(1.1), policy(2.0))
  ]
  np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("depth", range(1, L + 1))
def test_at_zero_it_stops_at_the_least_depth(depth):
  np.testing.assert_array_equal(
    decode(model(), TOKENS, policy(0, depth))[1], depth
  )


def test_a_row_exits_where_it_would_alone():
  together = decode(model(), TOKENS, policy(0.3))
  for i in range(B):
    alone = decode(model(), TOKENS[i : i + 1], policy(0.3))
    np.testing.assert_array_equal(alone[1][0], together[1][i])
    np.testing.assert_allclose(alone[0][0], together[0][i], atol=1e-5)


def test_settings_share_a_trace():
  cache = prompted()
  run = jax.jit(lambda p: model()(TOKENS[:, :1], cache, stack=p).depth)
  for threshold, least in [(0, 1), (0.5, 2), (1.1, 4)]:
    run(policy(threshold, least))
  assert run._cache_size() == 1


def prompted():
  cache = model().empty_cache(B, T)
  return model()(TOKENS[:, :PROMPT], cache).cache


def test_the_cost_counts_layers_readouts_and_keys():
  """FLOPs by hand, for one token of each row."""
  d, f, v, s = CONFIG.features, CONFIG.hidden, CONFIG.vocab, T
  keys = 2 * B * d * 2 * 8  # one key/value head of width 8
  layer = keys + 4 * B * d * d + 4 * B * d * s + 4 * B * d * f
  readout = 2 * B * d * v
  cache = prompted()
  for depth in range(1, L + 1):
    out = model()(TOKENS[:, :1], cache, stack=policy(0, depth))
    spent = depth * (layer + readout) + (L - depth) * keys + readout
    np.testing.assert_allclose(out.cost.spent, spent, rtol=1e-6)
    np.testing.assert_allclose(out.cost.full, L * layer + readout, rtol=1e-6)


def test_exit_confidence_is_that_of_every_layer():
  out = model()(TOKENS, stack=every_layer)
  sure = exit_confidence(out.hidden, model().readout)
  states = reference.hidden(model(), TOKENS)
  want = [jax.nn.softmax(reference.readout(model(), h)).max(-1) for h in states]
  np.testing.assert_allclose(
    sure, np.array(want).reshape(L, -1).T, rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize("grouped", [True, False])
def test_refuses_layers_it_cannot_project(grouped):
  def layer(rngs):
    block = decoder_block(CONFIG, rngs)
    if grouped:
      return Group([block, decoder_block(CONFIG, rngs)])
    return MixtureOfDepths(block, CONFIG.features, rngs=rngs)

  with pytest.raises(ValueError, match=r"calm.*Block"):
    generate(model(layer), TOKENS, steps=2, policy=policy(0.5))
