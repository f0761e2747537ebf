# SPDX-License-Identifier: Apache-2.0
"""Law: a plan is a loop over its layers, baked in, by table or by decision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.plans import (
  PlanTable,
  run_anyway,
  run_if,
  run_plan,
  specialize,
)

L, D = 5, 4
WEIGHTS = {
  "w": jax.random.normal(jax.random.key(0), (L, D, D)),
  "b": jax.random.normal(jax.random.key(1), (L, D)),
}
X = jax.random.normal(jax.random.key(2), (3, D))
PLANS = [(0, 1, 2, 3, 4), (3,), (4, 0), (1, 1, 2)]


def layer(p, l, x):
  return jnp.tanh(x @ p["w"] + p["b"]) + l


def by_hand(plan):
  x = np.asarray(X)
  for l in plan:
    w, b = (np.asarray(WEIGHTS[name][l]) for name in ("w", "b"))
    x = np.tanh(x @ w + b) + l
  return x


def test_one_program_serves_all_plans():
  table = PlanTable.of(PLANS, L)
  run = jax.jit(lambda t, g: run_plan(layer, WEIGHTS, X, t, g))
  for g, plan in enumerate(PLANS):
    np.testing.assert_allclose(run(table, g), by_hand(plan), rtol=1e-5)
  assert run._cache_size() == 1
  assert "while" in run.lower(table, 0).as_text()


def test_the_table_is_padded_behind_the_end():
  table = PlanTable.of(PLANS, L)
  np.testing.assert_array_equal(table.count, [5, 1, 2, 3])
  assert table.kept.shape == (4, 5) and table.kept.max() < L
  for row, plan in zip(np.asarray(table.kept), PLANS):
    assert tuple(row[: len(plan)]) == plan


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("form", [tuple, np.array, jnp.array])
def test_a_specialized_stack_is_the_layers_of_the_plan(plan, form):
  small = specialize(WEIGHTS, form(plan))
  for name, a in WEIGHTS.items():
    np.testing.assert_array_equal(small[name], np.asarray(a)[list(plan)])


def test_specializes_on_the_device_too():
  small = jax.jit(specialize)(WEIGHTS, jnp.array([3, 1]))
  np.testing.assert_array_equal(small["w"], WEIGHTS["w"][jnp.array([3, 1])])


def _double(x, w):
  return 2 * x @ w


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_runs_if_kept(keep, reverse):
  w = WEIGHTS["w"][0]
  want = 2 * X @ w if keep else X
  for f in (run_if, run_anyway):
    got = jax.jit(lambda k, f=f: f(k, _double, X, w, reverse=reverse))(keep)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("reverse", [True, False])
def test_vmap_over_the_decision_still_skips(reverse):
  """A callback counts what is really computed."""
  ran = []

  def f(x):
    jax.debug.callback(lambda: ran.append(1))
    return x + 1

  keep = jnp.array([True, False, True, False])
  call = lambda k: run_if(k, f, X, reverse=reverse)
  got = jax.jit(jax.vmap(call))(keep)
  jax.block_until_ready(got)
  jax.effects_barrier()
  assert len(ran) == 2
  np.testing.assert_allclose(got, X + keep[:, None, None], rtol=1e-6)


def test_a_skipped_step_has_the_gradient_of_the_identity():
  loss = lambda keep, w: jnp.sin(run_if(keep, _double, X, w)).sum()
  grad = jax.jit(jax.grad(loss, argnums=1))
  w = WEIGHTS["w"][0]
  assert not np.any(grad(False, w))
  want = jax.grad(lambda w: jnp.sin(2 * X @ w).sum())(w)
  np.testing.assert_allclose(grad(True, w), want, rtol=1e-5)


@pytest.mark.parametrize("plan", [(), (0, L), (-1,)])
def test_refuses_layers_that_are_not_there(plan):
  with pytest.raises(ValueError, match="0..4"):
    specialize(WEIGHTS, plan)
  with pytest.raises(ValueError, match="0..4"):
    PlanTable.of([(0,), plan], L)


def test_refuses_a_table_of_nothing_and_a_stack_that_is_none():
  with pytest.raises(ValueError, match="at least one plan"):
    PlanTable.of([], L)
  with pytest.raises(ValueError, match="leading axis"):
    specialize({"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}, (0,))
