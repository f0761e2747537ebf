# SPDX-License-Identifier: Apache-2.0
"""Law: the sorted loss is the mean of the losses of truncated models.

And a prefix of the layers is the truncated model, however it is called.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adaptivejax.core.losses import cross_entropy
from adaptivejax.decode import generate
from adaptivejax.methods.depth import prefix, sorted_loss
from adaptivejax.models import decoder_block
from adaptivejax.nn import Group, every_layer
from tests.methods.host import CONFIG, PROMPT, TOKENS, B, T, decode, model

L = CONFIG.layers
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]


def loss(model, exits=None, weights=None):
  out = model(INPUTS, stack=every_layer)
  return sorted_loss(
    out.hidden, model.readout, TARGETS, exits=exits, weights=weights
  )


def first(model, n):
  """The model of the first n layers, by itself."""
  small = jax.tree.map(lambda a: a, model)  # a copy
  small.layers = jax.tree.map(lambda a: a[:n], small.layers)
  small.config = dataclasses.replace(CONFIG, layers=n * small.layers.depth)
  return small


def truncated(model, n):
  return cross_entropy(first(model, n)(INPUTS).logits, TARGETS).mean()


def separate(model, exits, weights):
  losses = jnp.stack([truncated(model, n) for n in exits])
  return (losses * jnp.array(weights)).sum() / sum(weights)


@pytest.mark.parametrize(
  ("exits", "weights"),
  [
    (None, None),
    ((L,), None),
    ((1, 3), None),
    ((2, 4), (2.0, 4.0)),
    ((1, 2, 3, 4), (1.0, 2.0, 3.0, 4.0)),
  ],
)
def test_value_and_gradient_are_those_of_separate_models(exits, weights):
  run = jax.jit(jax.value_and_grad(lambda m: loss(m, exits, weights)))
  exits = exits or tuple(range(1, L + 1))
  weights = weights or (1.0,) * len(exits)
  want = jax.jit(jax.value_and_grad(lambda m: separate(m, exits, weights)))
  got, want = run(model()), want(model())
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    size = float(np.abs(w).max())
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * size)


def test_the_last_exit_alone_is_the_plain_loss():
  plain = cross_entropy(model()(INPUTS).logits, TARGETS).mean()
  np.testing.assert_allclose(loss(model(), (L,)), plain, rtol=1e-6)


@pytest.mark.parametrize(
  ("exits", "weights", "named"),
  [
    ((), None, "exits"),
    ((0, 1), None, "exits"),
    ((L + 1,), None, "exits"),
    ((1, 2), (1.0,), "weights"),
    ((1, 2), (), "weights"),
    ((1, 2), (0.0, 0.0), "weights"),
    ((1, 2), (2.0, -1.0), "weights"),
  ],
)
def test_refuses_exits_and_weights_that_do_not_fit(exits, weights, named):
  with pytest.raises(ValueError, match=named):
    loss(model(), exits, weights)


def sub_model(n):
  return Partial(prefix, depth=jnp.int32(n))


def pairs(rngs):
  return Group([decoder_block(CONFIG, rngs), decoder_block(CONFIG, rngs)])


@pytest.mark.parametrize("n", range(1, L + 1))
def test_a_prefix_is_the_truncated_model(n):
  small = first(model(), n)
  got, want = model()(TOKENS, stack=sub_model(n)), small(TOKENS)
  np.testing.assert_allclose(got.logits, want.logits, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(got.depth, n)
  np.testing.assert_array_equal(got.shares, np.arange(L) < n)
  got = decode(model(), TOKENS, sub_model(n), sub_model(n))
  want = decode(small, TOKENS)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got[3].k[:, :n], want[3].k, rtol=1e-5, atol=1e-5)
  assert (got[3].pos[:, n:] == -1).all(), "nobody asks the layers above"
  readout = (got[2].spent - want[2].spent) / want[2].spent
  np.testing.assert_allclose(readout, 0, atol=1e-6)
  np.testing.assert_allclose(
    got[2].full, decode(model(), TOKENS)[2].full, rtol=1e-6
  )


def test_the_whole_prefix_is_the_model_bit_by_bit():
  got, want = decode(model(), TOKENS, sub_model(L)), decode(model(), TOKENS)
  jax.tree.map(np.testing.assert_array_equal, got[::3], want[::3])


def test_generates_what_the_truncated_model_would():
  """The engine's prompt runs all layers: only keys, and the first token."""
  lengths = np.array([3, 5, 4])
  made = generate(
    model(), TOKENS[:, :PROMPT], steps=4, lengths=lengths, policy=sub_model(2)
  )
  for b, n in enumerate(lengths):
    text = np.concatenate([TOKENS[b, :n], made.tokens[b]])[None]
    said = first(model(), 2)(jnp.asarray(text)).logits.argmax(-1)[0]
    np.testing.assert_array_equal(made.tokens[b, 1:], said[n:-1])


def test_a_group_counts_its_layers():
  out = model(pairs)(TOKENS, stack=sub_model(1))
  want = first(model(pairs), 1)(TOKENS)
  np.testing.assert_allclose(out.logits, want.logits, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(out.depth, 2)
  jax.tree.map(np.testing.assert_allclose, out.signals, want.signals)


def test_depths_share_a_trace():
  cache = model().empty_cache(B, T)
  run = jax.jit(lambda p: model()(TOKENS[:, :1], cache, stack=p).depth.max())
  assert [int(run(sub_model(n))) for n in range(1, L + 1)] == [1, 2, 3, 4]
  assert run._cache_size() == 1


@pytest.mark.parametrize("depth", [0, L + 1, -1])
def test_a_prefix_of_other_layers_is_refused(depth):
  with pytest.raises(ValueError, match=f"depth={depth}.*1\\.\\.4"):
    model()(TOKENS, stack=Partial(prefix, depth=depth))


def test_a_prefix_is_not_trained():
  with pytest.raises(ValueError, match="sorted_loss"):
    model()(TOKENS, stack=sub_model(2), key=jax.random.key(0))
