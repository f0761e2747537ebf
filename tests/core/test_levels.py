# SPDX-License-Identifier: Apache-2.0
"""Law: level k is the sum of the first k blocks; a prefix is a slice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.levels import level_apply, prefix_slice

N, D, F, M = 11, 4, 6, 3
KEYS = jax.random.split(jax.random.key(0), 3)
BLOCKS = (
  jax.random.normal(KEYS[0], (M, D, F)),
  jax.random.normal(KEYS[1], (M, F, D)),
)
X = jax.random.normal(KEYS[2], (N, D))


def block(rows, weights):
  return jax.nn.relu(rows @ weights[0]) @ weights[1]


def brute(blocks, x, level):
  rows = [
    sum(
      (block(row, (blocks[0][i], blocks[1][i])) for i in range(min(k, M))),
      jnp.zeros(D),
    )
    for row, k in zip(x, level)
  ]
  return jnp.stack(rows)


def gradients(f, level):
  loss = lambda blocks, x: (f(blocks, x, level) ** 2).sum()
  return jax.grad(loss, argnums=(0, 1))(BLOCKS, X)


@pytest.mark.parametrize("top", [0, 1, M, M + 2])
def test_values_and_gradients(top):
  level = np.random.default_rng(top).integers(top + 1, size=N)
  f = jax.jit(lambda blocks, x, level: level_apply(block, x, level, blocks)[0])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
  close(f(BLOCKS, X, level), brute(BLOCKS, X, level))
  jax.tree.map(close, gradients(f, level), gradients(brute, level))


def test_cost_counts_the_blocks_that_ran():
  level = jnp.array([0] * 4 + [1] * 4 + [3] * 3)
  _, cost = level_apply(block, X, level, BLOCKS)
  assert cost.items == 4 + 3 * 3
  assert cost.full == M * N * 4 * D * F
  assert cost.items <= cost.capacity <= M * N


def test_prefix_slice():
  tree = {"up": jnp.arange(12).reshape(3, 4), "bias": jnp.arange(4)}
  cut = prefix_slice(tree, {"up": (None, 2), "bias": (2,)})
  np.testing.assert_array_equal(cut["up"], tree["up"][:, :2])
  np.testing.assert_array_equal(cut["bias"], [0, 1])


@pytest.mark.parametrize("width", [(0,), (5,), (None, 2)])
def test_prefix_slice_refuses_what_does_not_fit(width):
  with pytest.raises(ValueError, match="does not fit"):
    prefix_slice(jnp.arange(4), width)


def test_blocks_must_be_stacked():
  with pytest.raises(ValueError, match="leading axis"):
    level_apply(block, X, jnp.ones(N, jnp.int32), (BLOCKS[0], BLOCKS[1][:2]))
