# SPDX-License-Identifier: Apache-2.0
"""Law: a run that is stopped and resumed equals one that is not."""

import dataclasses
import json
import signal

import chex
import pytest

from adaptivejax.training import (
  OptimizerConfig,
  load_run,
  loop,
  progress,
  step,
  train,
)
from adaptivejax.training.run import read_metrics
from tests.training import tiny


@pytest.fixture
def corpus(tmp_path):
  return tiny.write_corpus(tmp_path / "corpus")


def quiet(config, out, **options):
  return train(config, out=out, progress=False, **options)


def signal_after(monkeypatch, number, at):
  """Sends this process a signal during step `at`."""
  advance = progress.Display.advance

  def advance_and_signal(display, now):
    advance(display, now)
    if now == at:
      signal.raise_signal(number)

  monkeypatch.setattr(progress.Display, "advance", advance_and_signal)


def history(out):
  """The metrics without what depends on the clock."""
  clock = ("seconds", "tokens_per_second")
  return [
    {name: value for name, value in line.items() if name not in clock}
    for line in read_metrics(out)
  ]


def params_of(result):
  return step.split(result.model)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_and_resume_equals_no_stop(corpus, tmp_path, monkeypatch, number):
  optimizer = OptimizerConfig(accumulate=2)
  config = tiny.config(corpus, optimizer=optimizer, log_every=2)
  before = signal.getsignal(number)
  whole = quiet(config, tmp_path / "whole")
  assert (whole.step, whole.stopped) == (6, 0)
  with monkeypatch.context() as patch:
    signal_after(patch, number, at=3)
    part = quiet(config, tmp_path / "parts")
  assert (part.step, part.stopped) == (3, number)
  assert signal.getsignal(number) is before
  rest = quiet(config, tmp_path / "parts")
  assert (rest.step, rest.stopped) == (6, 0)
  chex.assert_trees_all_equal(params_of(rest), params_of(whole))
  assert history(tmp_path / "parts") == history(tmp_path / "whole")


def test_a_killed_run_repeats_what_no_checkpoint_holds(corpus, tmp_path):
  out = tmp_path / "run"
  quiet(tiny.config(corpus, steps=4), out)
  with (out / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "split": "train", "seconds": 9, "loss": 7}\n')
    file.write('{"step": 6, "split": "tra')
  quiet(tiny.config(corpus, steps=6), out)
  steps = [line["step"] for line in read_metrics(out)]
  assert steps == [1, 2, 3, 3, 4, 4, 5, 6, 6]
  seconds = [line["seconds"] for line in read_metrics(out)]
  assert seconds == sorted(seconds)


def test_a_finished_run_is_only_loaded(corpus, tmp_path, monkeypatch):
  config = tiny.config(corpus)
  first = quiet(config, tmp_path / "run")
  monkeypatch.setattr(loop, "evaluate", None)
  again = quiet(config, tmp_path / "run")
  assert again.metrics == first.metrics and again.step == 6
  chex.assert_trees_all_equal(params_of(again), params_of(first))


def test_learns_and_logs_means(corpus, tmp_path):
  optimizer = OptimizerConfig(learning_rate=0.05, warmup=2)
  config = tiny.config(
    corpus, steps=60, optimizer=optimizer, log_every=20, eval_every=30
  )
  result = quiet(config, tmp_path / "run")
  lines = read_metrics(tmp_path / "run")
  train_lines = [line for line in lines if line["split"] == "train"]
  assert [line["step"] for line in train_lines] == [20, 40, 60]
  held = [line for line in lines if line["split"] == "validation"]
  assert [line["step"] for line in held] == [30, 60]
  assert result.metrics["validation/bits_per_byte"] < 4
  assert train_lines[-1]["share"] == 0.25
  assert train_lines[-1]["tokens_per_second"] > 0
  record = json.loads((tmp_path / "run" / "run.json").read_text())
  assert record["steps"] == 60 and record["optimizer.learning_rate"] == 0.05


def test_never_clobbers(corpus, tmp_path):
  config = tiny.config(corpus)
  out = tmp_path / "run"
  quiet(config, out)
  before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
  source = tmp_path / "other.py"
  source.write_text("other")
  others = {
    "another architecture": tiny.config(corpus, features=9),
    "seed=0, not 5": dataclasses.replace(config, seed=5),
    "optimizer.warmup=2, not 3": dataclasses.replace(
      config, optimizer=OptimizerConfig(warmup=3)
    ),
  }
  for named, other in others.items():
    with pytest.raises(ValueError, match=named):
      quiet(other, out, source=source)
  assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_refuses_a_folder_of_something_else(corpus, tmp_path):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").write_text("years of work")
  (tmp_path / "file").write_text("")
  for name in ("mine", "file"):
    with pytest.raises(ValueError, match="give the run another name"):
      quiet(tiny.config(corpus), tmp_path / name)
  assert len(list((tmp_path / "mine").iterdir())) == 1


def test_load_run_rebuilds_the_model(corpus, tmp_path):
  source = tmp_path / "a_config.py"
  source.write_text(
    "from tests.training import tiny\n"
    f"def config():\n  return tiny.config({str(corpus)!r})\n"
  )
  result = quiet(tiny.config(corpus), tmp_path / "run", source=source)
  config, model = load_run(tmp_path / "run" / "config.py")
  assert config.steps == 6
  chex.assert_trees_all_equal(step.split(model)[1], params_of(result))


@pytest.mark.parametrize(
  ("text", "named"),
  [
    ("def config(:", "SyntaxError"),
    ("x = 1", "has no attribute 'config'"),
    ("def config():\n  return 3", "must return a TrainConfig"),
    (None, "is no config file"),
  ],
)
def test_refuses_a_file_that_is_no_config(tmp_path, text, named):
  path = tmp_path / "config.py"
  if text is not None:
    path.write_text(text)
  with pytest.raises(ValueError, match=f"config.py.*{named}"):
    load_run(path)


@pytest.mark.parametrize("name", ["steps", "log_every", "eval_batches", "keep"])
def test_refuses_sizes_that_are_not_positive(corpus, name):
  with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
    dataclasses.replace(tiny.config(corpus), **{name: 0})


def test_refuses_parts_that_do_not_divide_the_batch(corpus):
  with pytest.raises(ValueError, match="accumulate=3 must divide data.batch=4"):
    tiny.config(corpus, optimizer=OptimizerConfig(accumulate=3))
