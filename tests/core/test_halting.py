# SPDX-License-Identifier: Apache-2.0
"""Law: what rules read is what NumPy and SciPy compute, at the edges, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from adaptivejax.core.halting import (
  EntropyRing,
  Streak,
  cdf,
  delta,
  entropy,
  exit_distribution,
  logit_margin,
  margin,
  max_prob,
  patience,
  saturation,
)

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(3 * RNG.normal(size=(5, 4, 7)), jnp.float32)
P = special.softmax(np.asarray(LOGITS, np.float64), axis=-1)
A, B = jnp.asarray(RNG.normal(size=(2, 6, 9)), jnp.float32)


def test_confidences_of_logits():
  ranked = np.sort(P, -1)
  np.testing.assert_allclose(max_prob(LOGITS), ranked[..., -1], rtol=1e-5)
  gap = ranked[..., -1] - ranked[..., -2]
  np.testing.assert_allclose(margin(LOGITS), gap, rtol=1e-5, atol=1e-6)
  ranked = np.sort(LOGITS, -1)
  gap = ranked[..., -1] - ranked[..., -2]
  np.testing.assert_allclose(logit_margin(LOGITS), gap, rtol=1e-6)
  want = stats.entropy(P, axis=-1)
  np.testing.assert_allclose(entropy(LOGITS), want, rtol=1e-5, atol=1e-6)


def test_probabilities_saturate_and_logits_do_not():
  sure = jnp.array([[20.0, 0, 0], [40.0, 0, 0]])
  np.testing.assert_array_equal(max_prob(sure), 1)
  np.testing.assert_array_equal(margin(sure), 1)
  np.testing.assert_array_equal(logit_margin(sure), [20, 40])
  assert not (max_prob(sure) >= 1.1).any()


def test_ties_and_excluded_classes():
  tied = jnp.array([1.0, 1, -jnp.inf, -jnp.inf])
  np.testing.assert_allclose(max_prob(tied), 0.5)
  assert margin(tied) == logit_margin(tied) == 0
  np.testing.assert_allclose(entropy(tied), np.log(2), rtol=1e-6)
  assert np.isfinite(jax.grad(entropy)(tied)).all()
  assert entropy(jnp.array([0.0, -jnp.inf])) == 0


@pytest.mark.parametrize(
  "read", [max_prob, margin, logit_margin, lambda x: -entropy(x)]
)
def test_nan_is_never_sure(read):
  assert not read(jnp.array([jnp.nan, 0.0, 1.0])) >= -1e9


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_saturation_is_the_cosine_at_any_size(scale):
  a, b = np.asarray(A, np.float64), np.asarray(B, np.float64)
  want = (a * b).sum(-1) / np.linalg.norm(a, axis=-1)
  want = want / np.linalg.norm(b, axis=-1)
  got = saturation(jnp.float32(scale) * A, B)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
  same = saturation(A, jnp.float32(scale) * A)
  np.testing.assert_allclose(same, 1, rtol=1e-6)
  assert same.max() <= 1


def test_saturation_of_zeros_is_zero_and_of_nan_nan():
  zero = jnp.zeros(9)
  assert saturation(zero, zero) == saturation(zero, A[0]) == 0
  assert np.isfinite(jax.grad(saturation)(zero, A[0])).all()
  assert np.isnan(saturation(zero.at[3].set(jnp.nan), A[0]))


def test_delta_is_the_root_mean_square():
  want = np.sqrt((np.asarray(A - B, np.float64) ** 2).mean(-1))
  np.testing.assert_allclose(delta(A, B), want, rtol=1e-5)
  assert delta(A[0], A[0]) == 0
  half = delta(A.astype(jnp.bfloat16), B.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32


def test_patience_counts_agreements():
  seen = np.array([[3, 3, 3, 1, 1], [0, 0, 2, 2, 2], [4, 5, 4, 5, 5]])
  want = np.array([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2], [0, 0, 0, 0, 1]])
  memory = Streak.none(3)
  for column, count in zip(seen.T, want.T):
    got, memory = patience(jnp.asarray(column), memory)
    np.testing.assert_array_equal(got, count)


def test_no_prediction_is_no_agreement():
  memory, counts = Streak.none(1), []
  for said in (-1, -1, 3, 3, -1, 3, -1, -1):
    count, memory = patience(jnp.array([said]), memory)
    counts.append(int(count[0]))
  assert counts == [0, 0, 0, 1, 0, 0, 0, 0]


def test_exits_are_a_distribution_and_its_running_sum():
  stop = RNG.random((6, 5)).astype(np.float32)
  stop[2, 0], stop[:, 1], stop[:, 2], stop[0, 3] = 1, 0, 1, 0
  p = np.asarray(exit_distribution(jnp.asarray(stop)))
  want, left = [], np.ones(5)
  for i, row in enumerate(stop.astype(np.float64)):
    want.append(left * (row if i < 5 else 1))
    left = left * (1 - row)
  np.testing.assert_allclose(p, want, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(p.sum(0), 1, rtol=1e-6)
  survived = jnp.ones(5)
  for i, row in enumerate(stop[:-1]):
    total, survived = cdf(jnp.asarray(row), survived)
    np.testing.assert_allclose(total, p[: i + 1].sum(0), atol=1e-6)
  slope = jax.grad(lambda s: exit_distribution(s)[3].sum())(jnp.asarray(stop))
  assert np.isfinite(slope).all()


def test_one_exit_takes_all():
  np.testing.assert_array_equal(exit_distribution(jnp.zeros((1, 3))), 1)


def test_a_ring_is_the_mean_of_the_last_steps():
  ring, seen = EntropyRing.empty(2, 3), [[], []]
  np.testing.assert_array_equal(ring.mean(), np.inf)
  for step in range(8):
    value = RNG.random(2).astype(np.float32)
    live = np.array([True, step % 3 != 1])
    ring = ring.push(jnp.asarray(value), jnp.asarray(live))
    for row in np.flatnonzero(live):
      seen[row].append(value[row])
    want = [np.mean(row[-3:]) for row in seen]
    np.testing.assert_allclose(ring.mean(), want, rtol=1e-6)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: margin(jnp.ones((2, 1))), "two classes"),
    (lambda: logit_margin(jnp.ones((2, 1))), "two classes"),
    (lambda: EntropyRing.empty(2, 0), "width=0"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
