# SPDX-License-Identifier: Apache-2.0
"""Law: one budget is one set of thresholds, and samples leave as it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import special, stats

from adaptivejax.core import (
  exit_depth,
  logit_margin,
  max_prob,
  solve_exit_thresholds,
)
from adaptivejax.methods.depth import dynamic_perceiver
from tests.methods.host import ENCODER, LABELS, ROWS, every_exit, leave

K = ENCODER.layers


@pytest.mark.parametrize("confidence", [max_prob, logit_margin])
def test_rows_leave_at_their_thresholds(confidence):
  logits, _ = every_exit()
  table = np.array(confidence(jnp.asarray(logits))).T
  shares = dynamic_perceiver.scaled_fractions(0.8)
  thresholds = solve_exit_thresholds(table, shares)
  want = exit_depth(table, jnp.asarray(thresholds))
  assert len(np.unique(want)) > 1, "the case decides nothing"
  rule = functools.partial(
    dynamic_perceiver.budgeted_exit, confidence=confidence
  )
  got = leave(Partial(rule, thresholds=jnp.asarray(thresholds)))
  # the sample a threshold was taken from may fall on either side of it
  near = np.isclose(table, thresholds, rtol=1e-4).any(1)
  assert near.sum() <= K
  np.testing.assert_array_equal(got.exit[~near], want[~near])


def test_shares_are_scaled():
  got = dynamic_perceiver.scaled_fractions(0.5, (1.0, 0.5, 2.0))
  want = np.array([0.5, 0.125, 0.25])
  np.testing.assert_allclose(got, want / want.sum())


def test_saturated_confidences_miss_the_budget_and_margins_meet_it():
  """All samples are sure: probabilities tie at 1, margins do not."""
  rng = np.random.default_rng(0)
  logits = np.zeros((4, 300, 3), np.float32)
  logits[..., 0] = 40 + 10 * rng.random((4, 300))
  shares = np.array([0.1, 0.2, 0.3, 0.4])
  misses = []
  for confidence in (max_prob, logit_margin):
    table = np.array(confidence(jnp.asarray(logits))).T
    depth = exit_depth(table, jnp.asarray(solve_exit_thresholds(table, shares)))
    got = np.bincount(depth, minlength=5)[1:] / 300
    misses.append(np.abs(got - shares).max())
  assert misses[0] > 0.5
  assert misses[1] <= 1.01 / 300


def test_the_loss():
  logits, _ = every_exit()
  weights, alpha, heat = dynamic_perceiver.WEIGHTS, 0.7, 2.0
  p = special.softmax(logits.astype(np.float64), -1)
  task = -np.log(p[:, np.arange(ROWS), np.asarray(LABELS)]).mean(1)
  warm = special.softmax(logits.astype(np.float64) / heat, -1)
  apart = [stats.entropy(warm[-1], q, axis=-1).mean() for q in warm[:-1]]
  want = (task * weights).sum() + alpha * heat**2 * sum(apart)
  loss = functools.partial(
    dynamic_perceiver.perceiver_loss, alpha=alpha, temperature=heat
  )
  np.testing.assert_allclose(loss(jnp.asarray(logits), LABELS), want, rtol=1e-4)


def test_the_last_exit_does_not_learn_from_the_others():
  logits = jnp.asarray(every_exit()[0])
  loss = dynamic_perceiver.perceiver_loss
  slopes = [
    jax.grad(lambda z, a=a: loss(z, LABELS, alpha=a))(logits)
    for a in (0.0, 5.0)
  ]
  np.testing.assert_allclose(slopes[0][-1], slopes[1][-1], atol=1e-6)
  assert np.abs(slopes[0][0] - slopes[1][0]).max() > 1e-3


def test_bad_input_is_refused_in_words():
  logits = jnp.zeros((3, ROWS, 4))
  with pytest.raises(ValueError, match="one per exit"):
    dynamic_perceiver.perceiver_loss(logits, LABELS)
  with pytest.raises(ValueError, match="scales"):
    dynamic_perceiver.scaled_fractions(0.5, (0.0, 0.0))
