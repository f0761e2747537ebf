# SPDX-License-Identifier: Apache-2.0
"""Law: the schedule, the mask and the clip are what the config says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.training.optimizer import (
  OptimizerConfig,
  decays,
  learning_rate,
  make_optimizer,
)


@pytest.mark.parametrize("steps", [1, 2, 30, 1000])
def test_learning_rate_peaks_after_warmup_and_ends_at_the_floor(steps):
  config = OptimizerConfig(learning_rate=0.01, warmup=20, floor=0.1)
  rate = learning_rate(config, steps)
  values = np.array([rate(step) for step in range(steps + 1)])
  assert values.argmax() == min(20, steps - 1)
  assert values.max() == pytest.approx(0.01)
  assert values[-1] == pytest.approx(0.001)
  assert (values > 0).all()


def test_decays_all_but_biases_and_scales():
  params = {"mlp": {"kernel": 0, "bias": 0}, "norm": {"scale": 0}}
  assert decays(params) == {
    "mlp": {"kernel": True, "bias": False},
    "norm": {"scale": False},
  }


def test_decay_alone_shrinks_a_kernel_and_leaves_a_scale():
  config = OptimizerConfig(learning_rate=0.1, warmup=0, weight_decay=0.5)
  optimizer = make_optimizer(config, steps=10)
  params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones((3, 2))}
  zero = {name: jnp.zeros_like(leaf) for name, leaf in params.items()}
  updates, _ = optimizer.update(zero, optimizer.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-5)
  assert not updates["scale"].any()


def test_clip_bounds_the_first_moment():
  optimizer = make_optimizer(OptimizerConfig(clip=2.0, b1=0.9), steps=10)
  params = {"kernel": jnp.zeros((4,))}
  huge = {"kernel": jnp.full((4,), 1e6)}
  _, state = optimizer.update(huge, optimizer.init(params), params)
  mean = state[1][0].mu["kernel"]
  np.testing.assert_allclose(jnp.linalg.norm(mean), 0.1 * 2.0, rtol=1e-5)


def test_balance_goes_by_the_sign_of_its_gradient_and_disturbs_nobody():
  """At its own rate, in warm-up too; its gradient has no part in the clip."""
  config = OptimizerConfig(
    learning_rate=0.1, warmup=5, weight_decay=0.5, clip=1.0, balance_rate=0.01
  )
  optimizer = make_optimizer(config, steps=10)
  rest = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(3)}
  params = {"router": {"load_bias": jnp.ones(4), **rest}}
  load = jnp.array([1e6, -1e-6, 0.0, 3.0])
  grads = {"router": {"load_bias": load, **jax.tree.map(jnp.ones_like, rest)}}
  state, alone = optimizer.init(params), optimizer.init({"router": rest})
  for _ in range(3):
    updates, state = optimizer.update(grads, state, params)
    without = {"router": {name: grads["router"][name] for name in rest}}
    want, alone = optimizer.update(without, alone, {"router": rest})
    moved = updates["router"].pop("load_bias")
    np.testing.assert_allclose(moved, [-0.01, 0.01, 0, -0.01], rtol=1e-6)
    chex.assert_trees_all_equal(updates, want)


@pytest.mark.parametrize(
  "wrong",
  [
    {"balance_rate": -1e-3},
    {"learning_rate": float("nan")},
    {"weight_decay": -0.1},
    {"b1": 1.0},
    {"b2": -0.1},
    {"learning_rate": 0.0},
    {"clip": -1.0},
    {"floor": 2.0},
    {"accumulate": 0},
    {"warmup": -1},
  ],
)
def test_refuses_settings_outside_their_range(wrong):
  [(name, value)] = wrong.items()
  with pytest.raises(ValueError, match=f"{name}={value}"):
    OptimizerConfig(**wrong)
