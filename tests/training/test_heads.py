# SPDX-License-Identifier: Apache-2.0
"""Law: a head is trained by Adam on a model that is data and stays as it is."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from adaptivejax.methods.depth import controller_loss
from adaptivejax.nn import every_layer
from adaptivejax.nn.linear import linear
from adaptivejax.training import fit_head, heads
from tests.methods.host import CONFIG, TOKENS, model

WINDOWS = np.asarray(TOKENS, np.int32)
STEPS = 12


def head():
  return linear(CONFIG.features, 3, rngs=nnx.Rngs(0))


def fit(host=None, **how):
  settings = {"steps": STEPS, "batch": 2, **how}
  return fit_head(head(), controller_loss, host or model(), WINDOWS, **settings)


def test_equals_adam_step_by_step():
  adam = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
  draw, want = np.random.default_rng(5), head()
  state = adam.init(want)
  for _ in range(STEPS):
    text = TOKENS[draw.integers(0, len(WINDOWS), 2)]
    hidden = model()(text[:, :-1], stack=every_layer).hidden
    loss = lambda h, x=hidden, y=text[:, 1:]: controller_loss(
      h, x, model().readout, y
    )
    updates, state = adam.update(jax.grad(loss)(want), state)
    want = optax.apply_updates(want, updates)
  got = fit(seed=5).kernel.get_value()
  moved = np.abs(got - head().kernel.get_value()).max()
  assert moved > 1e-2, "nothing was learnt"
  np.testing.assert_allclose(got, want.kernel.get_value(), atol=1e-3 * moved)


def test_the_model_and_the_rate_are_data():
  """Another model of the same shape, or another rate, compiles nothing."""
  before, kept = heads._step._cache_size(), jax.tree.map(np.array, model())
  one = fit()
  after = heads._step._cache_size()
  two = fit(model(seed=1), steps=3, learning_rate=1e-2)
  assert heads._step._cache_size() == after <= before + 1
  assert (one.kernel.get_value() != two.kernel.get_value()).any()
  jax.tree.map(np.testing.assert_array_equal, model(), kept)


def test_says_how_far_it_is():
  steps = []
  fit(steps=3, progress=lambda: steps.append(1))
  assert len(steps) == 3


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: fit(steps=0), "steps=0"),
    (lambda: fit(batch=0), "batch=0"),
    (lambda: few(WINDOWS[:0]), r"\(0, 10\)"),
    (lambda: few(WINDOWS[:, :1]), "next token"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def few(windows):
  fit_head(head(), controller_loss, model(), windows)
