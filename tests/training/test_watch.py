# SPDX-License-Identifier: Apache-2.0
"""Law: what goes wrong for `PATIENCE` lines is said once, and its end too."""

import signal

import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.training import train
from adaptivejax.training.run import read_events
from adaptivejax.training.watch import PATIENCE, Watch
from tests.training import tiny
from tests.training.test_loop import signal_after

WRONG = {
  "router collapse": {"collapse": 0.95},
  "dead experts": {"dead": 0.125},
  "budget miss": {"budget": 0.3},
}
WELL = {"collapse": 0.5, "dead": 0.0, "share": 0.52, "budget": 0.5}


def events(lines, split="train"):
  watch = Watch()
  said = [watch.see({"split": split, **line}) for line in lines]
  return [[event for event, _ in each] for each in said]


@pytest.mark.parametrize("event", WRONG)
def test_is_said_once_after_patience(event):
  wrong = WELL | WRONG[event]
  said = events([wrong] * (PATIENCE - 1) + [WELL] + [wrong] * (PATIENCE + 3))
  at = 2 * PATIENCE - 1
  assert said == [[event] if i == at else [] for i in range(len(said))]


def test_its_end_is_said():
  watch = Watch({"split": "train", "dead": 1.0} for _ in range(PATIENCE))
  assert watch.see({"split": "train", "dead": 0.0}) == [
    ("dead experts", "dead experts is over")
  ]
  assert watch.see({"split": "train", "dead": 0.0}) == []


def test_an_evaluation_is_not_a_line_of_training():
  assert not any(events([WELL | WRONG["dead experts"]] * 9, "validation"))


def test_it_goes_on_as_if_it_had_not_stopped():
  lines = [{"split": "train", **WELL, **WRONG["budget miss"]}] * PATIENCE
  for cut in range(PATIENCE):
    watch = Watch(lines[:cut])
    said = [event for line in lines[cut:] for event, _ in watch.see(line)]
    assert said == ["budget miss"]


def shares(*values):
  return [
    event for each in events({"share": v} for v in values) for event in each
  ]


def test_exits_that_collapse():
  moved = [0.8, 0.7, 0.5, 0.4]
  first, last = [0.25] * (PATIENCE + 1), [0.9] * (PATIENCE + 1)
  assert shares(*moved, *first) == ["exit collapse"]
  assert shares(*moved, *last) == ["exit collapse"]
  assert shares(*[0.995] * PATIENCE) == ["exit collapse"]
  for values, where in ((first, "first"), (last, "last")):
    watch = Watch({"split": "train", "share": v} for v in moved + values[:-1])
    ((_, text),) = watch.see({"split": "train", "share": values[-1]})
    assert f"all tokens leave {where}" in text


def test_exits_that_do_not_collapse():
  rng = np.random.default_rng(0)
  assert shares(*[1.0] * 9) == []  # nothing adapts
  assert shares(*[0.25] * 9) == []  # so many by design
  assert shares(*(0.4 + 0.01 * rng.normal(size=200))) == []
  settling = 0.4 + 0.4 * 0.9 ** np.arange(60) + 3e-4 * rng.normal(size=60)
  assert shares(*settling) == []


def test_lines_without_a_mean_are_passed_over():
  assert not any(events([{"skipped": 3}] * 9))


def test_a_run_says_it_in_its_events_and_once(tmp_path, monkeypatch):
  """Also where it is stopped between."""

  def loss(model, batch, key):
    value, metrics = tiny.loss(model, batch, key)
    return value, metrics | {"dead": jnp.float32(0.5)}

  corpus = tiny.write_corpus(tmp_path / "corpus")
  config = tiny.config(corpus, loss=loss)
  with monkeypatch.context() as patch:
    signal_after(patch, signal.SIGTERM, at=2)
    train(config, out=tmp_path / "run", progress=False)
  train(config, out=tmp_path / "run", progress=False)
  resumed, dead = read_events(tmp_path / "run")
  assert (resumed["step"], resumed["event"]) == (2, "resumed")
  assert (dead["step"], dead["event"]) == (PATIENCE, "dead experts")
  assert "50% of them get next to no items" in dead["text"]
