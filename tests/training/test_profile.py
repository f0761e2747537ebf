# SPDX-License-Identifier: Apache-2.0
"""Law: the profiler sees the steps that it is asked to see, and no others."""

import gzip
import json
import re

import pytest

from adaptivejax.training import profile, train
from adaptivejax.training.profile import Window
from tests.training import tiny


def test_the_steps_of_the_window_are_traced(tmp_path):
  config = tiny.config(tiny.write_corpus(tmp_path / "corpus"))
  train(config, out=tmp_path / "run", progress=False, window=Window(2, 2))
  traces = [*(tmp_path / "run/profile").rglob("perfetto_trace.json.gz")]
  assert len(traces) == 1
  with gzip.open(traces[0]) as file:
    events = json.load(file)["traceEvents"]
  steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
  assert sorted(steps) == ["2", "3"]


def test_a_run_that_ends_inside_of_the_window_leaves_its_trace(tmp_path):
  with (
    pytest.raises(KeyError),
    profile.Profiler(tmp_path, Window(1, 9)) as profiler,
  ):
    profiler.step(1, {}.pop, "x")
  assert [*tmp_path.rglob("perfetto_trace.json.gz")]


@pytest.mark.parametrize("text", ["5", "5:", ":5", "0:5", "5:0", "a:b", "1:-2"])
def test_what_is_no_window(text):
  with pytest.raises(ValueError, match=f"--profile '{text}' must be STEP:COU"):
    profile.parse(text)


@pytest.mark.parametrize("window", [Window(3, 1), Window(10, 2)])
def test_steps_that_are_not_left(window):
  said = re.escape(f"--profile {window[0]}:{window[1]} must lie within")
  with pytest.raises(ValueError, match=said + ".*step 3 of 10"):
    profile.check(window, 3, 10)
  profile.check(Window(4, 7), 3, 10)
