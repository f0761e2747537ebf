# SPDX-License-Identifier: Apache-2.0
"""The run that nothing happened to, and what it is to be the same."""

import json

import chex
import jax
import pytest

from adaptivejax.training import checkpoint, loop, train
from adaptivejax.training.run import read_events, read_metrics
from tests.faults import victim
from tests.training import tiny

CLOCK = ("seconds", "tokens_per_second")


def history(out):
  """The metrics without what depends on the clock."""
  return [
    {name: value for name, value in line.items() if name not in CLOCK}
    for line in read_metrics(out)
  ]


def saved(out):
  """All of the newest checkpoint: arrays, and the place of the run."""
  config = victim.config("unused")
  _, _, like = loop.start(config, loop.make_optimizer(config.optimizer, 8))
  folder, fixed = out / "checkpoints", {}
  with checkpoint.Checkpoints(folder, fixed, keep=2) as found:
    found.settings = json.loads((out / "run.json").read_text())
    state, place = found.restore(like)
  return jax.device_get(state), place


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  return tiny.write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="session")
def whole(corpus, tmp_path_factory):
  """The run that nothing happened to."""
  out = tmp_path_factory.mktemp("whole") / "run"
  train(victim.config(corpus), out=out, progress=False)
  return out


@pytest.fixture(scope="session")
def goes_on(corpus, whole):
  def goes_on(out):
    """The step from which the run goes on, to what it would have been."""
    result = train(victim.config(corpus), out=out, progress=False)
    assert result.step == 8
    assert history(out) == history(whole)
    chex.assert_trees_all_equal(saved(out), saved(whole))
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert [name for name in kept if name.isdigit()] == ["6", "8"]
    assert not [name for name in kept if name.endswith((".part", ".old"))]
    events = [e["step"] for e in read_events(out) if e["event"] == "resumed"]
    return events[-1] if events else 0

  return goes_on
