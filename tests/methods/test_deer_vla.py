# SPDX-License-Identifier: Apache-2.0
"""Law: a control step leaves once the action moved no more than its threshold.

The model's outputs are taken as actions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adaptivejax.core import exit_fractions
from adaptivejax.methods.depth import deer_vla
from tests.methods.host import ENCODER, ROWS, every_exit, leave

K, A = ENCODER.layers, ENCODER.classes
BEFORE = np.random.default_rng(5).normal(size=(ROWS, A)).astype(np.float32)


def changes(before):
  """Root mean square change at every exit, [K, B]."""
  actions, _ = every_exit()
  steps = np.diff(np.concatenate([before[None], actions]), axis=0)
  return np.sqrt((steps.astype(np.float64) ** 2).mean(-1))


def walk(before, thresholds, max_layer):
  exits = []
  for row in changes(before).T:
    due = [k for k in range(K) if row[k] <= thresholds[k]]
    exits.append(min([*due, max_layer - 1, K - 1]) + 1)
  return np.array(exits)


def control(thresholds, max_layer=K, before=None, held=None):
  rule = Partial(
    deer_vla.action_exit,
    thresholds=jnp.asarray(thresholds, jnp.float32),
    max_layer=jnp.int32(max_layer),
  )
  memory = deer_vla.Control.start(ROWS, A)
  if before is not None:
    memory = memory._replace(action=jnp.asarray(before))
  if held is not None:
    memory = memory._replace(held=jnp.asarray(held, jnp.int32))
  return leave(rule, memory).exit


@pytest.mark.parametrize("max_layer", [K, 3])
def test_leaves_where_the_action_settled(max_layer):
  thresholds = np.quantile(changes(BEFORE), 0.55, 1)  # between two samples
  want = walk(BEFORE, thresholds, max_layer)
  assert len(np.unique(want)) > 1, "the case decides nothing"
  got = control(thresholds, max_layer, BEFORE)
  np.testing.assert_array_equal(got, want)


def test_without_an_action_before_it_nobody_leaves_at_the_first_exit():
  np.testing.assert_array_equal(control([1e9] * K), 2)
  np.testing.assert_array_equal(control([1e9] * K, before=BEFORE), 1)
  np.testing.assert_array_equal(control([-1.0] * K, before=BEFORE), K)
  np.testing.assert_array_equal(control([-1.0] * K, 1), 1)


def test_an_exit_is_held_for_a_stage():
  held = np.arange(ROWS) % (K + 1)
  got = control([1e9] * K, before=BEFORE, held=held)
  np.testing.assert_array_equal(got, np.maximum(held, 1))
  exit = jnp.asarray(held)
  for step, anew in enumerate([False, False, True, False, False, True]):
    kept = deer_vla.hold(exit, step, 3)
    np.testing.assert_array_equal(kept, 0 if anew else held)


@pytest.mark.parametrize("q", [0.5, 1.0, 1.7])
def test_thresholds_spread_the_samples_as_wished(q):
  rng = np.random.default_rng(0)
  actions = jnp.asarray(rng.normal(size=(4, 500, 3)), jnp.float32)
  fractions = exit_fractions(q, 4) * [0, 1, 1, 1]
  fractions /= fractions.sum()
  found = deer_vla.solve_action_thresholds(actions, fractions)
  steps = np.sqrt((np.diff(np.asarray(actions), axis=0) ** 2).mean(-1))
  due = np.vstack([np.zeros(500, bool), steps <= found[1:, None]])
  due[-1] = True
  got = np.bincount(due.argmax(0), minlength=4) / 500
  np.testing.assert_allclose(got, fractions, atol=4 / 500)
  with pytest.raises(ValueError, match="before"):
    deer_vla.solve_action_thresholds(actions, exit_fractions(q, 4))


def test_random_exits_are_uniform_and_whole_states():
  states = jnp.arange(3.0)[:, None, None, None] + jnp.zeros((3, 40, 50, 2))
  got = deer_vla.random_exits(states, jax.random.key(0))
  np.testing.assert_array_equal(got[..., 0], got[..., 1])
  share = np.bincount(np.asarray(got[..., 0], int).ravel()) / got[..., 0].size
  np.testing.assert_allclose(share, 1 / 3, atol=0.04)


def test_the_loss_is_that_of_random_exits_and_of_each():
  rng = np.random.default_rng(0)
  every, random = rng.random((3, 5)), rng.random(5)
  got = deer_vla.deer_loss(
    jnp.asarray(every, jnp.float32), jnp.asarray(random, jnp.float32)
  )
  want = random.mean() + (every[0] + every[1] + every[2]).mean() / 3
  np.testing.assert_allclose(got, want, rtol=1e-6)
