# SPDX-License-Identifier: Apache-2.0
"""Law: unified skipping decodes by the model made of the kept layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adaptivejax.methods.depth import kept_layers, unified_skip
from tests.methods.host import CONFIG, PROMPT, TOKENS, decode, model

L = CONFIG.layers


def published(layers, speedup):
  """The rule as published: walk the layers until enough are kept."""
  target = int(layers / speedup)
  interval = int(layers / (target - 1))
  kept = [0, layers - 1]
  for i in range(1, layers - 1):
    if len(kept) == target:
      break
    if i % interval == 0:
      kept.append(i)
  return tuple(sorted(kept))


@pytest.mark.parametrize("speedup", [1, 1.25, 1.5, 2, 3, 4, 5])
def test_keeps_the_published_layers(speedup):
  for layers in range(1, 49):
    if layers < speedup:
      continue
    kept = kept_layers(layers, speedup)
    even = kept_layers(layers, speedup, rounded=True)
    count = int(layers / speedup)
    assert len(kept) == len(even) == count
    if count > 1:
      assert kept == published(layers, speedup)
      gaps = np.diff(even)
      assert even[0] == 0 and even[-1] == layers - 1
      assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    else:
      assert kept == even == (layers - 1,)


def policy(*kept):
  return Partial(unified_skip, kept=jnp.asarray(kept, jnp.int32))


def test_all_layers_are_plain_decoding_bit_by_bit():
  plain = decode(model(), TOKENS)
  kept = decode(model(), TOKENS, policy(*range(L)))
  jax.tree.map(np.testing.assert_array_equal, kept, plain)


@pytest.mark.parametrize("kept", [(0, 3), (0, 1, 3), (3,), (1, 2)])
def test_equals_the_model_of_the_kept_layers(kept):
  logits, depth, _, _ = decode(model(), TOKENS, policy(*kept))
  np.testing.assert_array_equal(depth, len(kept))
  cache = model().empty_cache(*TOKENS.shape)
  cache = model()(TOKENS[:, :PROMPT], cache).cache
  small = jax.tree.map(lambda a: a, model())  # a copy
  small.layers = jax.tree.map(lambda a: a[jnp.array(kept)], small.layers)
  small.config = dataclasses.replace(CONFIG, layers=len(kept))
  want = decode(small, TOKENS, cache=cache.take(jnp.array(kept)))
  np.testing.assert_allclose(logits, want[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [(0, 3), (0, 1, 3), (3,), (0, 1, 2, 3)])
def test_costs_exactly_the_kept_layers(kept):
  steps, batch = TOKENS.shape[1] - PROMPT, TOKENS.shape[0]
  readout = 2 * CONFIG.features * CONFIG.vocab * batch * steps
  cost = decode(model(), TOKENS, policy(*kept))[2]
  whole = decode(model(), TOKENS)[2]
  share = (cost.spent - readout) / (whole.spent - readout)
  np.testing.assert_allclose(share, len(kept) / L, rtol=1e-6)
  np.testing.assert_allclose(cost.full, whole.full, rtol=1e-6)


@pytest.mark.parametrize("speedup", [0.5, 0, L + 1, float("nan")])
def test_refuses_a_speedup_that_cannot_be(speedup):
  with pytest.raises(ValueError, match="speedup"):
    kept_layers(L, speedup)


@pytest.mark.parametrize("kept", [(), (0, 1, 2, 3, 3)])
def test_refuses_a_plan_that_cannot_be(kept):
  with pytest.raises(ValueError, match="kept"):
    decode(model(), TOKENS, policy(*kept))
