# SPDX-License-Identifier: Apache-2.0
"""Law: a row leaves where its last `limit` exits agreed with the one before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adaptivejax.core import Streak
from adaptivejax.methods.depth import pabee
from tests.methods.host import ENCODER, INPUTS, ROWS, encoder, every_exit, leave

K, C = ENCODER.layers, ENCODER.classes


def wait(agree, limit):
  """Row by row: the exit at which `limit` agreements in a row are reached."""
  exits = []
  for row in agree.T:
    count, depth = 0, K
    for i, same in enumerate(row):
      count = count + 1 if same else 0
      if count >= limit:
        depth = i + 1
        break
    exits.append(depth)
  return np.array(exits)


@pytest.mark.parametrize("limit", [0, 1, 2, K])
def test_leaves_after_agreements(limit):
  logits, _ = every_exit()
  said = logits.argmax(-1)
  agree = np.vstack([np.zeros(ROWS, bool), said[1:] == said[:-1]])
  want = wait(agree, limit)
  rule = Partial(pabee.patient_exit, limit=jnp.int32(limit))
  got = leave(rule, Streak.none(ROWS))
  np.testing.assert_array_equal(got.exit, want)
  taken = logits[want - 1, np.arange(ROWS)]
  np.testing.assert_allclose(got.logits, taken, rtol=1e-4, atol=1e-5)


def test_the_case_decides_something():
  logits, _ = every_exit()
  said = logits.argmax(-1)
  agree = np.vstack([np.zeros(ROWS, bool), said[1:] == said[:-1]])
  assert len(np.unique(wait(agree, 1))) > 1


def test_a_row_that_is_nan_never_leaves_early():
  rule = Partial(pabee.patient_exit, limit=jnp.int32(1))
  run = jax.jit(lambda x: encoder()(x, rule, Streak.none(ROWS)).exit)
  want = np.array(run(INPUTS))
  at = int(want.argmin())
  assert want[at] < K, "the case decides nothing"
  want[at] = K
  got = run(INPUTS.at[at].set(jnp.nan))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  ("limit", "tolerance"), [(1, 1.0), (1, 2.0), (2, 2.0), (0, 0.0), (1, 0.0)]
)
def test_regression_waits_for_steady_outputs(limit, tolerance):
  logits, _ = every_exit()
  moved = np.abs(np.diff(logits, axis=0)).max(-1)
  agree = np.vstack([np.zeros(ROWS, bool), moved < tolerance])
  rule = Partial(
    pabee.steady_exit,
    limit=jnp.int32(limit),
    tolerance=jnp.float32(tolerance),
  )
  got = leave(rule, pabee.Steady.none(ROWS, C))
  np.testing.assert_array_equal(got.exit, wait(agree, limit))


def test_the_loss_weighs_exits_by_depth():
  losses = np.random.default_rng(0).random((3, 5)).astype(np.float32)
  want = ((losses[0] + 2 * losses[1] + 3 * losses[2]) / 6).mean()
  np.testing.assert_allclose(
    pabee.pabee_loss(jnp.asarray(losses)), want, rtol=1e-6
  )
  slope = jax.grad(pabee.pabee_loss)(jnp.asarray(losses))
  np.testing.assert_allclose(slope[2] / slope[0], 3, rtol=1e-5)
