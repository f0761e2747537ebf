# SPDX-License-Identifier: Apache-2.0
"""Law: thresholds found by calibration are the best there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adaptivejax.core.budget import (
  budget_loss,
  exit_depth,
  exit_fractions,
  solve_depth_threshold,
  solve_exit_thresholds,
  solve_setting,
)

levels = st.sampled_from([0.1, 0.25, 0.5, 0.5, 0.9, 1.0])  # ties on purpose
tables = hnp.arrays(
  np.float32, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=levels
)


def walk(confidence, thresholds):
  """Sample by sample, exit by exit."""
  depths = []
  for row in confidence:
    sure = [k for k, (c, t) in enumerate(zip(row, thresholds)) if c >= t]
    depths.append((sure or [len(row) - 1])[0] + 1)
  return np.array(depths)


@given(tables, st.floats(0, 1.2))
def test_exit_depth(confidence, level):
  want = walk(confidence, np.full(confidence.shape[1], np.float32(level)))
  np.testing.assert_array_equal(exit_depth(confidence, level), want)


@given(tables, st.floats(0, 1))
def test_the_depth_threshold_is_the_lowest_that_is_deep_enough(table, share):
  exits = table.shape[1]
  wanted = 1 + share * (exits - 1)
  found = solve_depth_threshold(table, wanted)
  assert exit_depth(table, found).mean() >= wanted
  lower = [float(c) for c in [-np.inf, *np.unique(table[:, :-1])] if c < found]
  assert all(exit_depth(table, c).mean() < wanted for c in lower)


def test_exit_thresholds_spread_distinct_confidences_as_wished():
  rng = np.random.default_rng(0)
  confidence = rng.permutation(4000).reshape(1000, 4).astype(np.float32)
  for q in (0.3, 1.0, 2.0):
    wished = exit_fractions(q, 4)
    depths = walk(confidence, solve_exit_thresholds(confidence, wished))
    got = np.bincount(depths, minlength=5)[1:] / 1000
    np.testing.assert_allclose(got, wished, atol=3e-3)


def test_equal_confidences_leave_together():
  confidence = np.ones((10, 2), np.float32)
  thresholds = solve_exit_thresholds(confidence, np.array([0.3, 0.7]))
  np.testing.assert_array_equal(walk(confidence, thresholds), 1)


def test_nobody_leaves_where_nobody_should():
  confidence = np.random.default_rng(0).random((10, 3)).astype(np.float32)
  thresholds = solve_exit_thresholds(confidence, np.array([0.0, 0.0, 1.0]))
  np.testing.assert_array_equal(walk(confidence, thresholds), 3)


def test_solve_setting_meets_the_share_from_below():
  measure = lambda setting: 1 / (1 + np.exp(setting))
  found = solve_setting(measure, 0.25, low=-8.0, high=8.0, rounds=30)
  np.testing.assert_allclose(found, np.log(3), atol=1e-4)
  assert measure(found) <= 0.25


def test_budget_loss():
  shares = jnp.array([0.2, 0.6])
  np.testing.assert_allclose(budget_loss(shares, 0.5), 0.1, rtol=1e-5)
  np.testing.assert_allclose(
    budget_loss(shares, 0.5, squared=True), 0.01, rtol=1e-5
  )
  assert (jax.grad(budget_loss)(shares, 0.1) > 0).all()


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: exit_fractions(0, 3), "above 0"),
    (lambda: exit_fractions(1, 0), "at least one"),
    (lambda: solve_depth_threshold(np.ones((3, 2)), 2.5), "outside 1..2"),
    (lambda: solve_depth_threshold(np.ones((3, 2)), 0), "outside 1..2"),
    (lambda: solve_exit_thresholds(np.ones((3, 2)), np.ones(3)), "exits"),
    (lambda: solve_exit_thresholds(np.ones((3, 2)), np.ones(2)), "sum to 1"),
    (lambda: solve_setting(lambda _: 1.0, 0.0, low=0, high=1), "target"),
    (lambda: solve_setting(lambda _: 1.0, 0.5, low=1, high=1), "below"),
    (lambda: solve_setting(lambda _: 0.6, 0.5, low=0, high=1), "cannot be"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
