# SPDX-License-Identifier: Apache-2.0
"""Law: the risk that was promised is kept, as often as it was promised."""

import itertools
import math

import numpy as np
import pytest

from adaptivejax.core.risk import (
  hoeffding,
  hoeffding_bentkus,
  learn_then_test,
)

P_VALUES = (hoeffding, hoeffding_bentkus)


@pytest.mark.parametrize("p_value", P_VALUES)
@pytest.mark.parametrize("order", ["rising", "mixed"])
def test_the_promise_is_kept_over_many_draws(p_value, order):
  """Coins of known risk, one just above delta: the likeliest mistake."""
  rng, n, delta, epsilon = np.random.default_rng(0), 400, 0.2, 0.1
  wrong = found = 0
  risks = np.array([0.02, 0.08, 0.14, 0.201, 0.23, 0.3])
  if order == "mixed":  # not monotone: the guarantee holds all the same
    risks = risks[[0, 3, 1, 4, 2, 5]]
  for _ in range(500):
    losses = (rng.random((n, len(risks))) < risks).astype(np.float32)
    j = learn_then_test(losses, delta=delta, epsilon=epsilon, p_value=p_value)
    found += j is not None
    wrong += j is not None and risks[j] > delta
  assert wrong <= epsilon * 500
  assert found == 500, "0.02 is far enough below 0.2"


def test_walks_until_the_first_that_is_not_shown_safe():
  n, delta, epsilon = 200, 0.3, 0.05
  means = np.array([0.1, 0.15, 0.22, 0.1, 0.05])  # the third fails
  losses = np.tile(means, (n, 1))
  walked = None
  for j, r in enumerate(means):
    if math.exp(-2 * n * max(0, delta - r) ** 2) > epsilon:
      break
    walked = j
  assert walked == 1
  assert learn_then_test(losses, delta=delta, epsilon=epsilon) == walked
  safe = losses[:, [0, 1, 3]]
  assert learn_then_test(safe, delta=delta, epsilon=epsilon) == 2


@pytest.mark.parametrize("p_value", P_VALUES)
def test_what_cannot_be_shown_is_none(p_value):
  clean = lambda n: np.zeros((n, 2))
  ask = lambda losses: learn_then_test(
    losses, delta=0.05, epsilon=0.05, p_value=p_value
  )
  assert ask(clean(10)) is None  # too few samples for any loss
  assert ask(clean(1000)) == 1
  assert ask(np.ones((1000, 1))) is None


def test_p_values_by_hand():
  risk, n, delta = np.array([0.0, 0.02, 0.1, 0.5]), 50, 0.1
  want, tails = [], []
  for r in risk:
    want.append(math.exp(-2 * n * max(0, delta - r) ** 2))
    tails.append(
      sum(
        math.comb(n, k) * delta**k * (1 - delta) ** (n - k)
        for k in range(round(n * r) + 1)
      )
    )
  np.testing.assert_allclose(hoeffding(risk, n, delta), want, rtol=1e-12)
  got = hoeffding_bentkus(risk, n, delta)
  a = np.minimum(risk, delta)[1:]
  kl = a * np.log(a / delta) + (1 - a) * np.log((1 - a) / (1 - delta))
  kl = [-math.log(1 - delta), *kl]
  want = np.minimum(np.exp(-n * np.array(kl)), math.e * np.array(tails))
  np.testing.assert_allclose(got, want, rtol=1e-12)
  assert (np.diff(got) >= 0).all()
  assert (got[:2] < hoeffding(risk, n, delta)[:2]).all(), "it is sharper"
  assert got[-1] == 1, "a risk above delta shows nothing"


def test_a_mean_in_single_precision_counts_no_failure_more():
  exact = hoeffding_bentkus(np.array([0.07]), 100, 0.2)
  single = hoeffding_bentkus(np.array([0.07], np.float32), 100, 0.2)
  np.testing.assert_allclose(single, exact, rtol=1e-5)


BAD = {"delta": 0.1, "epsilon": 0.1}


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: learn_then_test(np.zeros((0, 2)), **BAD), "samples"),
    (lambda: learn_then_test(np.zeros((2, 0)), **BAD), "samples"),
    (lambda: learn_then_test(np.full((2, 2), 1.5), **BAD), r"0\.\.1"),
    (lambda: learn_then_test(np.full((2, 2), -0.1), **BAD), r"0\.\.1"),
    (lambda: learn_then_test(np.full((2, 2), np.nan), **BAD), r"0\.\.1"),
    *(
      (
        lambda d=d, e=e: learn_then_test(np.zeros((2, 2)), delta=d, epsilon=e),
        "between 0 and 1",
      )
      for d, e in itertools.chain(
        itertools.product((0, 1, np.nan), (0.1,)), ((0.1, 0), (0.1, 1))
      )
    ),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
