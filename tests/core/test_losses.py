# SPDX-License-Identifier: Apache-2.0
"""Law: losses are their definitions, also where exponentials overflow."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from adaptivejax.core.losses import (
  accuracy,
  binary_cross_entropy,
  cross_entropy,
)


def test_cross_entropy():
  logits = np.random.default_rng(0).normal(size=(3, 4, 5)) * 200
  targets = np.random.default_rng(1).integers(5, size=(3, 4))
  want = -np.take_along_axis(
    special.log_softmax(logits, -1), targets[..., None], -1
  )[..., 0]
  got = cross_entropy(jnp.float32(logits), jnp.asarray(targets))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_binary_cross_entropy():
  logits = np.array([-500.0, -2, 0, 3, 500])
  for truth in (True, False):
    side = logits if truth else -logits
    got = binary_cross_entropy(jnp.float32(logits), jnp.full(5, truth))
    np.testing.assert_allclose(
      got, -special.log_expit(side), rtol=1e-5, atol=1e-30
    )
  assert np.isfinite(
    jax.grad(lambda x: binary_cross_entropy(x, x > 0).sum())(jnp.zeros(2))
  ).all()


def test_accuracy_ties_go_to_the_lower_class():
  logits = jnp.array([[1.0, 1.0], [0.0, 2.0]])
  assert accuracy(logits, jnp.array([0, 1])) == 1
  assert accuracy(logits, jnp.array([1, 1])) == 0.5
