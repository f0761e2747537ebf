# SPDX-License-Identifier: Apache-2.0
"""Law: the loop, the scan and a row-by-row simulation agree on every row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.depth import depth_loop, depth_scan, only_after

L, B, D = 5, 6, 4
WEIGHTS = jax.random.normal(jax.random.key(0), (L, D, D))
X = jax.random.normal(jax.random.key(1), (B, D))


def layer(w, l, x, state, live):
  return jnp.tanh(x @ w), state + jnp.where(live, l + 1, 0).sum()


def halt(level, l, before, after, memory):
  del l, before
  return after[:, 0] > level, memory


@functools.partial(jax.jit, static_argnums=0)
def run(twin, w, x, level, min_depth):
  stop = functools.partial(halt, level)
  return twin(layer, w, x, jnp.int32(0), stop, min_depth=min_depth)


def simulate(level, min_depth):
  values, depths, state = [], [], 0
  for row in np.asarray(X):
    for l in range(L):
      row = np.tanh(row @ np.asarray(WEIGHTS[l]))
      state += l + 1
      if row[0] > level and l + 1 >= min_depth:
        break
    values.append(row)
    depths.append(l + 1)
  return np.array(values), np.array(depths), state


@pytest.mark.parametrize("min_depth", [1, 3, L])
@pytest.mark.parametrize("level", [-2.0, -0.2, 0.4, 2.0])
def test_twins_and_simulation_agree(level, min_depth):
  want, depths, state = simulate(level, min_depth)
  for twin in (depth_loop, depth_scan):
    out = run(twin, WEIGHTS, X, level, min_depth)
    np.testing.assert_allclose(out.x, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out.depth, depths)
    assert out.state == state


def forgetful(limit, l, before, after, memory):
  """Stops once the states of a row have summed above `limit`."""
  del l, before
  total = memory["total"] + after[:, 0]
  return total > limit, {"total": total, "asked": memory["asked"] + 1}


def test_the_memory_of_a_row_is_that_of_its_last_layer():
  start = {"total": jnp.zeros(B), "asked": jnp.zeros(B, jnp.int32)}
  rule = functools.partial(forgetful, 0.5)
  totals, depths = [], []
  for row in np.asarray(X):
    total = 0.0
    depth = 0
    for w in np.asarray(WEIGHTS):
      depth += 1
      row = np.tanh(row @ w)
      total += row[0]
      if total > 0.5:
        break
    totals.append(total)
    depths.append(depth)
  assert len(set(depths)) > 1, "the case decides nothing"
  for twin in (depth_loop, depth_scan):
    out = twin(layer, WEIGHTS, X, jnp.int32(0), rule, start)
    np.testing.assert_array_equal(out.depth, depths)
    np.testing.assert_array_equal(out.memory["asked"], depths)
    np.testing.assert_allclose(out.memory["total"], totals, rtol=1e-4)


def test_a_value_may_be_a_tree():
  """The rule reads what the layer made beside the state."""

  def twice(w, l, x, state, live):
    y, state = layer(w, l, x["x"], state, live)
    return {"x": y, "read": 2 * y[:, 0]}, state

  stop = lambda l, before, after, m: (after["read"] > 0.8, m)
  start = {"x": X, "read": jnp.zeros(B)}
  want = run(depth_loop, WEIGHTS, X, 0.4, 1)
  for twin in (depth_loop, depth_scan):
    out = twin(twice, WEIGHTS, start, jnp.int32(0), stop)
    np.testing.assert_array_equal(out.depth, want.depth)
    np.testing.assert_allclose(out.x["x"], want.x, rtol=1e-5)
    np.testing.assert_allclose(out.x["read"], 2 * want.x[:, 0], rtol=1e-5)


def test_memory_without_rows_is_refused():
  stop = functools.partial(halt, 0.0)
  for memory in (jnp.float32(0), jnp.zeros(B + 1)):
    with pytest.raises(ValueError, match=r"memory.*rows"):
      depth_loop(layer, WEIGHTS, X, jnp.int32(0), stop, memory)


@pytest.mark.parametrize("twin", [depth_loop, depth_scan])
def test_a_rule_is_asked_only_where_due(twin):
  """And remembers only what it was asked."""

  def asking(l, before, after, memory):
    return after[:, 0] > -0.2, memory + 10**l

  due = lambda l: (l % 2 == 1) & (l < L - 1)
  start = jnp.zeros(B, jnp.int32)
  out = jax.jit(
    lambda x: twin(layer, WEIGHTS, x, 0, only_after(due, asking), start)
  )(X)
  for b, row in enumerate(np.asarray(X)):
    memory = depth = 0
    for l in range(L):
      row, depth = np.tanh(row @ np.asarray(WEIGHTS[l])), depth + 1
      if l in (1, 3):
        memory += 10**l
        if row[0] > -0.2:
          break
    assert (out.depth[b], out.memory[b]) == (depth, memory)
  assert len(np.unique(out.depth)) > 1, "the case decides nothing"


def test_never_halting_is_the_plain_stack():
  plain = functools.reduce(lambda x, w: jnp.tanh(x @ w), WEIGHTS, X)
  out = run(depth_scan, WEIGHTS, X, 2.0, 1)
  np.testing.assert_allclose(out.x, plain, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(out.layers[-1], out.x)


def test_the_loop_stops_with_the_last_row():
  """Layers after the deepest row are not run: they would spoil the count."""
  counting = lambda w, l, x, state, live: (jnp.tanh(x @ w), state + 1)
  stop = functools.partial(halt, 0.4)
  out = depth_loop(counting, WEIGHTS, X[jnp.array([1, 5])], jnp.int32(0), stop)
  assert out.state == out.depth.max() < L


def test_gradients_of_the_scan_stop_where_the_row_did():
  out = lambda w: run(depth_scan, w, X, -2.0, 2).x.sum()
  grad = jax.grad(out)(WEIGHTS)
  assert np.abs(grad[:2]).min() > 0
  np.testing.assert_array_equal(grad[2:], 0)


def test_unstacked_parameters_are_refused():
  with pytest.raises(ValueError, match="stacked"):
    depth_loop(
      layer, (WEIGHTS, WEIGHTS[:2]), X, 0, functools.partial(halt, 0.0)
    )
