# SPDX-License-Identifier: Apache-2.0
"""Law: the rates and weights of the paper; a dropped layer is not there."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.methods.depth import dropout_rates, exit_weights, layer_dropout
from adaptivejax.nn import every_layer
from adaptivejax.training.tasks import layer_skip_language_modeling
from tests import reference
from tests.methods.host import CONFIG, TOKENS, B, T, model

L = CONFIG.layers


def test_rates_grow_from_nothing_to_the_most():
  want = [0.2 * (math.exp(l * math.log(2) / 5) - 1) for l in range(6)]
  np.testing.assert_allclose(dropout_rates(6, 0.2), want, rtol=1e-5)
  np.testing.assert_allclose(
    dropout_rates(6, 0.2, 0.5), np.array(want) / 2, 1e-5
  )
  assert dropout_rates(1, 0.2) == 0


def test_weights_are_those_of_the_paper():
  for layers, scale in ((2, 1.0), (6, 0.2), (32, 0.1)):
    want = [scale * sum(range(l + 1)) for l in range(layers - 1)]
    want.append(layers - 1 + scale * sum(range(layers - 1)))
    np.testing.assert_allclose(exit_weights(layers, scale), want, rtol=1e-5)


def test_the_curriculum_leaves_each_exit_its_turn():
  seen = np.zeros(6)
  for seed in range(30):
    w = exit_weights(6, 0.2, every=3, key=jax.random.key(seed))
    on = np.flatnonzero(w)
    assert w[-1] == exit_weights(6, 0.2)[-1]
    assert len({int(l) % 3 for l in on if l != 5 and l != 0}) <= 1
    seen += np.asarray(w > 0)
  assert (seen[1:] > 0).all()


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_sample_that_drops_a_layer_passes_it_by(rate):
  """The same drops, by the independent model."""
  rates = jnp.full(L, rate)
  stack = functools.partial(layer_dropout, rates=rates)
  key = jax.random.key(4)
  out = jax.jit(lambda m: m(TOKENS, stack=stack, key=key))(model())
  noise, _ = jax.random.split(key)
  kept = np.asarray(jax.random.uniform(noise, (L, B)) >= rate)
  assert rate == 0 or 0 < kept.mean() < 1
  live = np.broadcast_to(kept[..., None], (L, B, T))
  want = reference.hidden(model(), TOKENS, live, live)
  for got, state in zip(out.hidden, want):
    np.testing.assert_allclose(got, state, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(out.depth, np.tile(kept.sum(0)[:, None], T))
  if rate == 0:
    np.testing.assert_allclose(
      out.logits,
      model()(TOKENS, stack=every_layer).logits,
      rtol=1e-5,
      atol=1e-5,
    )


def test_the_loss_is_the_weighted_mean_over_exits():
  loss, _ = layer_skip_language_modeling(
    model(), TOKENS, jax.random.key(0), dropout=0.0, exit_scale=0.5
  )
  states = reference.hidden(model(), TOKENS[:, :-1])
  odds = [jax.nn.log_softmax(reference.readout(model(), h)) for h in states]
  each = [-jnp.take_along_axis(o, TOKENS[:, 1:, None], -1).mean() for o in odds]
  w = exit_weights(L, 0.5)
  np.testing.assert_allclose(loss, w @ jnp.stack(each) / w.sum(), rtol=1e-5)


def test_every_parameter_learns():
  grad = jax.grad(
    lambda m: layer_skip_language_modeling(m, TOKENS, jax.random.key(0))[0]
  )(model())
  for leaf in jax.tree.leaves(grad):
    assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: dropout_rates(4, 1.0), "p_max"),
    (lambda: exit_weights(4, -0.1), "scale"),
    (lambda: exit_weights(4, 0.1, every=5), "every"),
    (lambda: exit_weights(4, 0.1, every=2), "key"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
