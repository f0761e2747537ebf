# SPDX-License-Identifier: Apache-2.0
"""Law: a step that is not finite changes nothing; too many in a row stop."""

import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.training import step as module
from adaptivejax.training import train
from adaptivejax.training.checkpoint import steps
from adaptivejax.training.optimizer import make_optimizer
from adaptivejax.training.run import read_events, read_metrics
from tests.training import tiny
from tests.training.test_loop import history, params_of, signal_after

BATCH = np.arange(4 * 9, dtype=np.int32).reshape(4, 9)
HOW = {
  "nan": lambda x: (x - x) / (x - x),
  "inf": lambda x: 1 / (x - x),
  "gradient": lambda x: jnp.sqrt(0 * x),
}


@pytest.fixture
def corpus(tmp_path):
  return tiny.write_corpus(tmp_path / "corpus")


def bad_in(*numbers, how="nan"):
  """A loss that is bad in those steps; the budget is the number of the step."""

  def loss(model, batch, key, budget):
    value, metrics = tiny.loss(model, batch, key)
    bad = jnp.isin(budget, jnp.float32([n - 1 for n in numbers]))
    one = 1 + jnp.sum(model.head.bias.get_value())
    return value + jax.lax.cond(bad, HOW[how], jnp.zeros_like, one), metrics

  return {"loss": loss, "budget": jnp.float32}


@pytest.mark.parametrize("how", HOW)
def test_a_skipped_step_changes_nothing_but_its_number(how):
  config = tiny.config("unused", **bad_in(2, how=how))
  join, params = module.split(config.build(nnx.Rngs(0)))
  optimizer = make_optimizer(config.optimizer, 9)
  state = module.TrainState(jnp.int32(1), params, optimizer.init(params))
  step = module.make_step(config, join, optimizer, donate=False)
  new, metrics = step(state, BATCH, jax.random.key(0))
  assert metrics["skipped"] == 1 and new.step == 2
  chex.assert_trees_all_equal(new[1:], state[1:])
  after, metrics = step(new, BATCH, jax.random.key(0))
  assert metrics["skipped"] == 0
  assert (after.params["head"]["bias"] != new.params["head"]["bias"]).all()
  assert step._cache_size() == 1


def test_skips_are_counted_and_left_out_of_means(corpus, tmp_path):
  config = tiny.config(corpus, log_every=3, max_skips=2, **bad_in(4, 5))
  out = tmp_path / "run"
  result = train(config, out=out, progress=False)
  first, last = (x for x in read_metrics(out) if x["split"] == "train")
  assert "skipped" not in first and last["skipped"] == 2
  assert np.isfinite(last["loss"]) and last["budget"] == 5
  chex.assert_tree_all_finite(params_of(result))
  assert [e["step"] for e in read_events(out) if e["event"] == "skipped"] == [6]
  assert "NaN" not in (out / "metrics.jsonl").read_text()
  assert result.metrics["validation/bits_per_byte"] > 0


@pytest.mark.parametrize("at", [4, 5])
def test_a_stop_among_skips_is_none(corpus, tmp_path, monkeypatch, at):
  """Where no checkpoint is made, those steps are done again."""
  config = tiny.config(corpus, log_every=4, max_skips=2, **bad_in(4, 5))
  whole = train(config, out=tmp_path / "whole", progress=False)
  with monkeypatch.context() as patch:
    signal_after(patch, signal.SIGTERM, at=at)
    part = train(config, out=tmp_path / "parts", progress=False)
  assert part.stopped and steps(tmp_path / "parts" / "checkpoints") == [2]
  rest = train(config, out=tmp_path / "parts", progress=False)
  chex.assert_trees_all_equal(params_of(rest), params_of(whole))
  assert history(tmp_path / "parts") == history(tmp_path / "whole")


def test_too_many_in_a_row_stop_the_run(corpus, tmp_path):
  bad = range(3, 12)
  config = tiny.config(corpus, steps=12, max_skips=4, **bad_in(*bad))
  for _ in range(2):  # the same again
    match = "loss is nan at step 7, .*5 steps in a row .*--debug-nans names"
    with pytest.raises(ValueError, match=match):
      train(config, out=tmp_path / "run", progress=False)
    assert steps(tmp_path / "run" / "checkpoints") == [2]


def test_a_loss_that_is_not_finite_ends_the_run(corpus, tmp_path):
  config = tiny.config(corpus, max_skips=0, **bad_in(1, how="inf"))
  with pytest.raises(ValueError, match=r"inf at step 1.*lower optimizer\."):
    train(config, out=tmp_path / "run", progress=False)
