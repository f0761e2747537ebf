# SPDX-License-Identifier: Apache-2.0
"""Law: what calibration tests is what decoding would lose."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import special

from adaptivejax.core.risk import hoeffding, hoeffding_bentkus
from adaptivejax.decode import (
  calibrate,
  excess_error,
  excess_loss,
  inconsistency,
)
from adaptivejax.methods.depth import calm
from adaptivejax.nn import MAX_PROB
from tests.methods.host import CONFIG, PROMPT, decode, model

TEXTS = np.random.default_rng(2).integers(0, CONFIG.vocab, (40, 10))
TEXTS = jnp.asarray(TEXTS, jnp.int32)
LEVELS = (1.1, 0.45, 0.3, 0.2)
STACK = Partial(calm, measure=MAX_PROB, min_depth=jnp.int32(2))


def run(**how):
  settings = {"delta": 0.5, "epsilon": 0.2, "prompt": PROMPT, **how}
  return calibrate(model(), TEXTS, STACK, LEVELS, **settings)


def lost(loss):
  """By text and threshold, and the depths, f64[N, J]."""
  full = np.asarray(decode(model(), TEXTS)[0], np.float64)[:, :-1]
  target = np.asarray(TEXTS)[:, PROMPT + 1 :]
  nats = lambda a: (
    -np.take_along_axis(special.log_softmax(a, axis=-1), target[..., None], -1)[
      ..., 0
    ]
  )
  losses, depths = [], []
  for level in LEVELS:
    stack = Partial(STACK.func, **STACK.keywords, threshold=jnp.float32(level))
    early, depth, _, _ = decode(model(), TEXTS, stack)
    early = np.asarray(early, np.float64)[:, :-1]
    by_token = {
      inconsistency: early.argmax(-1) != full.argmax(-1),
      excess_error: (full.argmax(-1) == target) * 1.0
      - (early.argmax(-1) == target),
      excess_loss: nats(early) - nats(full),
    }[loss]
    losses.append(np.clip(by_token.mean(1), 0, 1))
    depths.append(np.asarray(depth)[:, :-1].mean())
  return np.array(losses).T, np.array(depths)


@pytest.mark.parametrize("loss", [inconsistency, excess_error, excess_loss])
def test_risks_and_depths_are_those_of_decoding(loss):
  losses, depths = lost(loss)
  found = run(loss=loss, delta=0.98)  # walks to the end
  np.testing.assert_allclose(found.risks, losses.mean(0), atol=1e-5)
  np.testing.assert_allclose(found.depths, depths, rtol=1e-6)
  assert (np.diff(found.depths) < 0).all(), "the case decides nothing"


@pytest.mark.parametrize("p_value", [hoeffding, hoeffding_bentkus])
def test_the_threshold_is_the_last_one_before_a_failure(p_value):
  losses, _ = lost(inconsistency)
  risks = losses.mean(0)
  answers = set()
  for delta in (0.02, 0.25, 0.4, 0.9):
    p = p_value(risks, len(TEXTS), delta)
    want = np.inf
    for level, p_level in zip(LEVELS, p):
      if p_level > 0.2:
        break
      want = np.float32(level)
    found = run(delta=delta, p_value=p_value)
    assert found.threshold == want
    read = 1 if want == np.inf else min(len(LEVELS), LEVELS.index(level) + 1)
    assert len(found.risks) == len(found.depths) == read, "and no further"
    answers.add(want)
  assert len(answers) > 2 and np.inf in answers, "the cases do not differ"


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: calibrate(model(), TEXTS, STACK, [0.3, 0.5], delta=0.1), "fall"),
    (lambda: calibrate(model(), TEXTS, STACK, [0.3, 0.3], delta=0.1), "fall"),
    (lambda: calibrate(model(), TEXTS, STACK, [], delta=0.1), "fall"),
    (lambda: calibrate(model(), TEXTS, STACK, [np.nan], delta=0.1), "fall"),
    (lambda: run(prompt=0), "prompt=0"),
    (lambda: run(prompt=9), "prompt=9"),
    (lambda: run(delta=1.0), "delta=1.0"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
