# SPDX-License-Identifier: Apache-2.0
"""Law: what is restored is what was saved; the wrong thing is refused."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from adaptivejax.training import step
from adaptivejax.training.checkpoint import Checkpoints, load_params
from tests.training import tiny


def state_of(features=8, number=3):
  _, params = step.split(tiny.Tiny(features, rngs=nnx.Rngs(number)))
  moments = optax.adam(1e-3).init(params)
  return step.TrainState(jnp.int32(number), params, moments)


def open_in(folder, settings=None, keep=2):
  return Checkpoints(folder / "checkpoints", settings or {"a": 1}, keep=keep)


def test_restores_what_was_saved_and_keeps_the_newest(tmp_path):
  with open_in(tmp_path) as checkpoints:
    assert checkpoints.latest is None
    for number in (1, 2, 5):
      checkpoints.save(state_of(number=number), {"next_index": number})
    checkpoints.save(state_of(number=5), {"next_index": 0})  # there already
  with open_in(tmp_path) as checkpoints:
    assert checkpoints.latest == 5
    state, place = checkpoints.restore(state_of(number=0))
  chex.assert_trees_all_equal(state, state_of(number=5))
  assert place == {"next_index": 5}
  kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert kept == {"2", "5"}
  params = load_params(tmp_path / "checkpoints", state_of(number=0).params)
  chex.assert_trees_all_equal(params, state.params)


def test_a_save_holds_the_values_it_was_given(tmp_path):
  """While it is being written buffers are donated, and lists grow."""
  bump = jax.jit(
    lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0
  )
  state = state_of(features=512, number=0)
  expected = jax.tree.map(jnp.copy, state)
  waiting = ["a step"]
  with open_in(tmp_path, keep=9) as checkpoints:
    save = checkpoints.orbax.save

    def late(*args, **named):
      waiting.append("a later step")
      save(*args, **named)

    checkpoints.orbax.save = late
    checkpoints.save(state, {"waiting": waiting})
    for _ in range(20):
      state = bump(state)
  with open_in(tmp_path) as checkpoints:
    found, place = checkpoints.restore(expected)
  chex.assert_trees_all_equal(found, expected)
  assert place == {"waiting": ["a step"]}


def test_refuses_another_architecture_and_names_the_parameter(tmp_path):
  with open_in(tmp_path) as checkpoints:
    checkpoints.save(state_of(), None)
    match = r"embed/embedding is float32\[256,8\] there and float32\[256,9\]"
    with pytest.raises(ValueError, match=match):
      checkpoints.restore(state_of(features=9))
    fewer = state_of().params | {"head": {}}
    with pytest.raises(ValueError, match="head/bias is .* and absent"):
      load_params(tmp_path / "checkpoints", fewer)


def test_refuses_other_settings_and_names_them(tmp_path):
  with open_in(tmp_path, {"data.batch": 4}) as checkpoints:
    checkpoints.save(state_of(), None)
  match = "trained with data.batch=4, not 8"
  with (
    open_in(tmp_path, {"data.batch": 8}) as checkpoints,
    pytest.raises(ValueError, match=match),
  ):
    checkpoints.restore(state_of())


def test_a_setting_that_came_later_was_at_its_default(tmp_path):
  with open_in(tmp_path, {"data.batch": 4}) as checkpoints:
    checkpoints.save(state_of(), None)
  later = {"data.batch": 4, "optimizer.balance_rate": 1e-3}
  with open_in(tmp_path, later) as checkpoints:
    state, _ = checkpoints.restore(state_of(number=0))
  chex.assert_trees_all_equal(state, state_of())


@pytest.mark.parametrize("made", [False, True])
def test_no_checkpoint_is_said_and_nothing_is_made(tmp_path, made):
  folder = tmp_path / "checkpoints"
  if made:
    folder.mkdir()
  with pytest.raises(ValueError, match="has no checkpoints"):
    load_params(folder, state_of().params)
  assert list(tmp_path.rglob("*")) == [folder] * made
