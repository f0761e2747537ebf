# SPDX-License-Identifier: Apache-2.0
"""Law: the sorted loss is the mean of the losses of truncated models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.losses import cross_entropy
from adaptivejax.methods.depth import sorted_loss
from adaptivejax.nn import every_layer
from tests.methods.host import CONFIG, TOKENS, model

L = CONFIG.layers
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]


def loss(model, exits=None, weights=None):
  out = model(INPUTS, stack=every_layer)
  return sorted_loss(
    out.hidden, model.readout, TARGETS, exits=exits, weights=weights
  )


def truncated(model, n):
  """Cross-entropy of the model of the first n layers, by itself."""
  small = jax.tree.map(lambda a: a, model)  # a copy
  small.layers = jax.tree.map(lambda a: a[:n], small.layers)
  return cross_entropy(small(INPUTS).logits, TARGETS).mean()


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
