"""Law: what a benchmark says is what its clock and its targets say."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from adaptivejax.report import clock as clock_lib
from benchmarks import harness, measure
from benchmarks.harness import Options, Row

ROOT = Path(__file__).parents[2]


class Clock:
  """Seconds that pass only when something runs."""

  def __init__(self):
    self.now = 0.0
    self.log = []

  def __call__(self):
    return self.now

  def work(self, name, *seconds):
    """A call that takes `seconds[round]`."""

    def call(i):
      self.log.append(name)
      self.now += seconds[i % len(seconds)]

    return call


def test_sides_alternate_and_each_round_is_timed():
  clock = Clock()
  a, b = clock.work("a", 1.0, 3.0), clock.work("b", 2.0)
  times = clock_lib.interleave([a, b], seconds=0, least=3, clock=clock)
  assert times == [[1, 3, 1], [2, 2, 2]]
  warm, rounds = clock.log[:2], clock.log[2:]
  assert warm == ["a", "b"]
  assert rounds == ["a", "b", "b", "a", "a", "b"]


def test_rounds_end_with_the_time_and_with_the_most():
  clock = Clock()
  limits = {"least": 2, "most": 6, "clock": clock}
  count = lambda seconds: len(
    clock_lib.interleave([clock.work("a", 1.0)], seconds=seconds, **limits)[0]
  )
  assert [count(s) for s in (0, 3.5, 100)] == [2, 4, 6]
  limits["least"] = 9  # wins over the most
  assert count(0) == 9


def test_what_is_not_warmed_is_called_in_rounds_only():
  clock = Clock()
  call = clock.work("a", 1.0)
  clock_lib.interleave([call], seconds=0, least=2, warm=False, clock=clock)
  assert clock.log == ["a", "a"]


def test_short_calls_are_repeated_and_hooks_are_not_timed():
  clock = Clock()
  hook = lambda: clock.work("hook", 5.0)(0)
  times = clock_lib.interleave(
    [clock.work("a", 0.25)],
    seconds=0, least=1, floor=1.0, before=hook, clock=clock,
  )  # fmt: skip
  assert times == [[0.25]]
  assert clock.log == ["a", "hook", "a", "a", "a", "a"]


def test_median_and_quartiles():
  row = Row.of("case", "metric", [5.0, 1.0, 2.0, 4.0, 3.0])
  assert (row.value, row.spread) == (3, (2, 4))
  assert Row.of("case", "metric", [7.0]).spread == (7, 7)


@pytest.mark.parametrize(
  "better, value, met",
  [
    ("higher", 0.93, True),
    ("higher", 0.92, False),
    ("lower", 3.0, True),
    ("lower", 3.1, False),
    ("lower", math.nan, False),
  ],
)
def test_targets(better, value, met):
  target = {"higher": 0.93, "lower": 3.0}[better]
  assert Row.of("c", "m", [value], target=target, better=better).met is met


def test_summary_names_the_missed():
  rows = [
    Row.of("a", "speed", [0.5], target=0.9),
    Row.of("b", "speed", [0.95], target=0.9),
    Row.of("b", "memory", [2.0], target=1.05, better="lower"),
    Row.of("c", "speed", [0.1]),
  ]
  assert harness.summary(rows) == (
    "1 of 3 targets met; missed: a speed (0.5, target >= 0.9);"
    " b memory (2, target <= 1.05)"
  )
  assert harness.summary(rows[1:2]) == "1 of 1 targets met"
  assert harness.summary([]) == "no figure of this run has a target"


def test_json_has_the_agreed_form_and_reads_back():
  rows = [Row.of("a", "x", [0.5, 0.75], target=0.9), Row.of("b", "y", [1.0])]
  record = json.loads(harness.to_json(rows))
  assert set(record) == {"environment", "rows"}
  assert record["rows"][1] == {
    "case": "b", "metric": "y", "value": 1.0, "spread": [1.0, 1.0],
    "target": None, "better": "higher",
  }  # fmt: skip
  for fact in ("date", "python", "jax", "backend", "cpu", "cores"):
    assert record["environment"][fact]
  assert harness.from_json(json.dumps(record)) == rows


def test_json_never_holds_nan():
  text = harness.to_json([Row.of("a", "x", [math.nan])])
  assert "NaN" not in text
  (row,) = harness.from_json(text)
  assert math.isnan(row.value) and all(map(math.isnan, row.spread))


def test_cases_are_patterns_and_a_wrong_one_is_refused():
  names = ["256-1024/512", "512-2048/512", "512-2048/2048"]
  select = lambda *patterns: Options(cases=patterns).select(names)
  assert select() == names
  assert select("*/512") == names[:2]
  assert select("256*", "*/2048") == [names[0], names[2]]
  with pytest.raises(ValueError, match=r"'1024\*' names no case.*256-1024/512"):
    select("1024*")


def test_table_marks_every_row(capsys):
  rows = [Row.of("a", "x", [0.5], target=0.9), Row.of("a", "y", [1], target=1)]
  from rich.console import Console

  Console(width=100).print(harness.table("Title", rows))
  out = capsys.readouterr().out
  assert "missed" in out and "met" in out and ">= 0.9" in out


def test_temp_memory_of_a_program_that_needs_some():
  step = lambda x: (x @ x).sum() + jnp.sort(x, axis=0).sum()
  assert measure.temp_bytes(step, jnp.ones((64, 64))) >= 64 * 64 * 4


def test_compile_time_is_measured_without_any_cache():
  enabled = jax.config.jax_enable_compilation_cache
  traces = []

  def step(x):
    traces.append(jax.config.jax_enable_compilation_cache)
    return x + 1

  (times,) = measure.compile_seconds([step], jnp.ones(3), seconds=0, least=2)
  assert len(times) == 2 and min(times) > 0
  assert traces == [False] * 3
  assert jax.config.jax_enable_compilation_cache == enabled


def run(*args):
  return subprocess.run(
    [sys.executable, "-m", "benchmarks.conditional", "--quick", *args],
    cwd=ROOT, capture_output=True, text=True, timeout=300,
  )  # fmt: skip


def test_conditional_runs(tmp_path):
  out = tmp_path / "out.json"
  done = run("--cases", "64-256/128", "--json", str(out))
  assert done.returncode == 0, done.stderr
  rows = harness.from_json(out.read_text())
  assert {row.case for row in rows} == {"64-256/128"}
  traces = [row.value for row in rows if row.metric.endswith("traces")]
  assert traces == [1, 1]


@pytest.mark.parametrize(
  "args, message",
  [
    (["--cases", "nothing"], "names no case"),
    (["--json", "/no/such/folder/x.json"], "a folder that exists"),
    (["--quack"], "unrecognized"),
  ],
)
def test_bad_arguments_exit_with_2_before_measuring(args, message):
  done = run(*args)
  assert done.returncode == 2 and message in done.stderr
