# SPDX-License-Identifier: Apache-2.0
"""Rates of rotary positions against the published formulas, pair by pair."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core import Ramp, Rope, rotary


def brute(rope, half):
  """Rates, one at a time, in the words of Llama 3.1's code."""
  rates = []
  for i in range(half):
    rate = rope.base ** (-i / half)
    slow = rate / rope.factor
    if rope.ramp is None:
      rates.append(slow)
      continue
    low, high, length = rope.ramp.low, rope.ramp.high, rope.ramp.length
    wave = 2 * math.pi / rate
    if wave < length / high:
      rates.append(rate)
    elif wave > length / low:
      rates.append(slow)
    else:
      smooth = (length / wave - low) / (high - low)
      rates.append((1 - smooth) * slow + smooth * rate)
  return np.array(rates)


@pytest.mark.parametrize(
  "rope",
  [
    Rope(),
    Rope(1e6),
    Rope(500.0, 4.0),
    Rope(100.0, 4.0, Ramp(1.0, 4.0, 64)),
    Rope(500_000.0, 8.0, Ramp(1.0, 4.0, 8192)),
  ],
)
def test_rates(rope):
  half = 32
  got, want = rope.rates(half), brute(rope, half)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  if rope.ramp:  # all three kinds of pairs are there
    share = want * rope.factor / brute(Rope(rope.base), half)
    assert share.min() == pytest.approx(1)
    assert share.max() == pytest.approx(rope.factor)
    assert len(np.unique(share.round(3))) > 2


def test_scores_depend_on_distance_at_these_rates():
  rope = Rope(50.0, 2.0, Ramp(1.0, 3.0, 16))
  x = jnp.arange(16.0).reshape(1, 1, 2, 8)
  at = lambda p: rotary(x, jnp.full((1, 1), p), rope)
  score = lambda a, b: (at(a) * at(b)).sum(-1)
  np.testing.assert_allclose(score(3, 7), score(13, 17), rtol=1e-5)
  pairs = x.reshape(-1, 2, 4)[:, 0] + 1j * x.reshape(-1, 2, 4)[:, 1]
  turned = pairs * np.exp(5j * brute(rope, 4))
  got = at(5).reshape(-1, 2, 4)
  np.testing.assert_allclose(got[:, 0], turned.real, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got[:, 1], turned.imag, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "make",
  [
    lambda: Rope(0.0),
    lambda: Rope(factor=-1.0),
    lambda: Ramp(4.0, 4.0, 64),
    lambda: Ramp(0.0, 4.0, 64),
    lambda: Ramp(1.0, 4.0, 0),
  ],
)
def test_bad_input(make):
  with pytest.raises(ValueError, match="positive|0 < low < high"):
    make()
