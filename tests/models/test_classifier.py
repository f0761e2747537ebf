# SPDX-License-Identifier: Apache-2.0
"""Law: a row is the row of the full model, cut off at its own exit.

The oracle runs the encoder in plain NumPy-like `jnp`, all keys visible, and
asks the rule row by row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adaptivejax.core import max_prob
from adaptivejax.models import Classifier, ClassifierConfig
from tests.methods.host import ENCODER as CONFIG
from tests.methods.host import INPUTS, ROWS, every_exit
from tests.methods.host import encoder as model

K, B = CONFIG.layers, ROWS


def sure(threshold, l, logits, pooled, memory):
  del l, pooled
  return max_prob(logits) >= threshold, memory


def counting(l, logits, pooled, memory):
  """Stops at the second exit with the same answer as the first."""
  del pooled
  same = logits.argmax(-1) == memory["last"]
  return same, {"last": logits.argmax(-1), "asked": memory["asked"] + 1}


@jax.jit
def answer(model, inputs, threshold, min_exit=1):
  return model(inputs, Partial(sure, threshold), min_exit=min_exit)


def test_every_exit_is_the_plain_encoder():
  got = jax.jit(Classifier.every_exit)(model(), INPUTS)
  logits, pooled = every_exit()
  np.testing.assert_allclose(got.logits, logits, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got.pooled, pooled, rtol=1e-4, atol=1e-5)


def test_tokens_see_both_ways():
  """The first token feels the last, and the last the first."""
  for token in (0, CONFIG.tokens - 1):
    moved = INPUTS.at[:, token].add(1.0)
    x = [model().embed(a) for a in (INPUTS, moved)]
    zero = jnp.zeros(x[0].shape[:2], jnp.int32)
    block = jax.tree.map(lambda a: a[0], model().layers)
    mixed = [block.attend(a, zero)[0] - a for a in x]
    others = np.arange(CONFIG.tokens) != token
    assert np.abs(mixed[0] - mixed[1])[:, others].min(1).max() > 1e-4


@pytest.mark.parametrize(
  ("threshold", "least"), [(0.4, 1), (0.5, 1), (0.4, 3), (0.6, 2)]
)
def test_rows_leave_at_their_first_sure_exit(threshold, least):
  logits, _ = every_exit()
  is_sure = np.array(jax.nn.softmax(logits, -1).max(-1)) >= threshold
  is_sure[: least - 1], is_sure[-1] = False, True
  want = is_sure.argmax(0)
  assert len(np.unique(want)) > 1, "the case decides nothing"
  got = answer(model(), INPUTS, threshold, least)
  np.testing.assert_array_equal(got.exit, want + 1)
  np.testing.assert_allclose(
    got.logits, logits[want, np.arange(B)], rtol=1e-4, atol=1e-5
  )


def test_the_rule_has_a_memory():
  start = {"last": jnp.full(B, -1), "asked": jnp.zeros(B, jnp.int32)}
  got = model()(INPUTS, counting, start)
  said = np.array(every_exit()[0]).argmax(-1)
  same = np.vstack([np.zeros(B, bool), said[1:] == said[:-1]])
  same[-1] = True
  np.testing.assert_array_equal(got.exit, same.argmax(0) + 1)
  np.testing.assert_array_equal(got.memory["asked"], got.exit)


def test_never_leaving_is_the_last_exit():
  want = jax.jit(Classifier.every_exit)(model(), INPUTS).logits[-1]
  for got in (answer(model(), INPUTS, 1.1), model()(INPUTS)):
    np.testing.assert_allclose(got.logits, want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got.exit, K)


def test_one_row_alone_saves_layers():
  spent = [
    float(answer(model(), INPUTS[:1], 0.0, least).cost.spent)
    for least in range(1, K + 1)
  ]
  steps = np.diff(spent)
  np.testing.assert_allclose(steps, steps[0], rtol=1e-5)
  assert spent[0] < spent[-1] / 3


def test_the_cost_is_that_of_the_rows_that_are_left():
  """FLOPs by hand: tokens that stay, the attention scores of all."""
  d, f, t, c = CONFIG.features, CONFIG.hidden, CONFIG.tokens, CONFIG.classes
  start = 2 * B * t * 3 * d
  scores = 4 * B * t * t * d
  row = t * (8 * d * d + 4 * d * f) + 2 * d * c
  got = answer(model(), INPUTS, 0.4)
  ran, rows = int(got.exit.max()), int(got.exit.sum())
  assert start + ran * scores + rows * row <= got.cost.spent <= got.cost.full
  full = start + K * (scores + B * row)
  np.testing.assert_allclose(got.cost.full, full, rtol=1e-6)
  plain = jax.jit(Classifier.every_exit)(model(), INPUTS).cost
  np.testing.assert_allclose(plain.spent, full, rtol=1e-6)


def test_a_row_that_is_nan_keeps_to_itself():
  bad = INPUTS.at[2].set(jnp.nan)
  got, want = answer(model(), bad, 0.4), answer(model(), INPUTS, 0.4)
  keep = np.arange(B) != 2
  np.testing.assert_array_equal(got.exit[keep], want.exit[keep])
  np.testing.assert_allclose(got.logits[keep], want.logits[keep], atol=1e-5)
  assert got.exit[2] == K


def test_bad_input_is_refused_in_words():
  with pytest.raises(ValueError, match="layers"):
    ClassifierConfig(layers=0)
  with pytest.raises(ValueError, match=r"\(5, 3\).*got \(9, 4, 3\)"):
    model().every_exit(INPUTS[:, 1:])
