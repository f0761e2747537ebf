# SPDX-License-Identifier: Apache-2.0
"""Law: a step is one update with the gradient of the whole batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.training import OptimizerConfig, evaluate, schedules
from adaptivejax.training import step as module
from tests.training import tiny

BATCH = np.arange(4 * 9, dtype=np.int32).reshape(4, 9)


def silent(model, batch, key):
  """The loss without its noise, so that a split of the batch does not show."""
  return tiny.loss(model, batch, None)


def made(**fields):
  config = tiny.config("unused", **fields)
  join, params = module.split(config.build(nnx.Rngs(0)))
  state = module.TrainState(jnp.int32(7), params, ())
  return config, join, state


def test_split_and_join_are_inverse():
  model = tiny.Tiny(rngs=nnx.Rngs(0))
  join, params = module.split(model)
  assert params["embed"]["embedding"].shape == (256, 8)
  tokens = jnp.arange(6).reshape(2, 3)
  chex.assert_trees_all_equal(join(params)(tokens), model(tokens))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradient_is_that_of_the_batch(parts):
  found = []
  for accumulate in (1, parts):
    optimizer = OptimizerConfig(accumulate=accumulate)
    config, join, state = made(loss=silent, optimizer=optimizer)
    key = jax.random.key(0)
    found.append(
      jax.jit(module.gradients, static_argnums=(0, 1))(
        config, join, state, jnp.asarray(BATCH), key
      )
    )
  chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


def test_a_loss_sees_the_budget_of_its_step():
  def loss(model, batch, key, budget):
    value, metrics = silent(model, batch, key)
    return value, metrics | {"budget": budget}

  config, join, state = made(loss=loss, budget=schedules.linear(0.5, steps=14))
  _, metrics = module.gradients(
    config, join, state, jnp.asarray(BATCH), jax.random.key(0)
  )
  assert metrics["budget"] == 0.75


def test_a_step_trains_and_traces_once():
  config, join, _ = made(loss=silent)
  optimizer = module.optax.sgd(0.5)
  _, params = module.split(config.build(nnx.Rngs(0)))
  state = module.TrainState(jnp.int32(0), params, optimizer.init(params))
  step = module.make_step(config, join, optimizer)
  losses = []
  for _ in range(5):
    state, metrics = step(state, BATCH, jax.random.key(0))
    losses.append(float(metrics["loss"]))
  assert losses == sorted(losses, reverse=True) and state.step == 5
  assert step._cache_size() == 1


def test_each_step_has_noise_of_its_own_and_repeats_it():
  def loss(model, batch, key):
    value, _ = silent(model, batch, key)
    return value, {"noise": jax.random.uniform(key)}

  config, join, _ = made(loss=loss)
  optimizer = module.optax.sgd(0.0)

  def noise():
    _, params = module.split(config.build(nnx.Rngs(0)))
    state = module.TrainState(jnp.int32(0), params, optimizer.init(params))
    step = module.make_step(config, join, optimizer)
    for _ in range(3):
      state, metrics = step(state, BATCH, jax.random.key(0))
      yield float(metrics["noise"])

  first, second = list(noise()), list(noise())
  assert first == second and len(set(first)) == 3


def test_bits_per_byte_of_a_uniform_guess_is_8():
  model = tiny.Tiny(rngs=nnx.Rngs(0))
  model = jax.tree.map(jnp.zeros_like, model)
  found = evaluate(model, np.stack([BATCH, BATCH + 5]))
  assert found == {"bits_per_byte": pytest.approx(8.0), "share": 0.25}
