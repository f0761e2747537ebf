"""Is a run that was killed, again and again, the run that was not?

python -m benchmarks.faults [--kills 50] [--quick] [--json FILE]

A small decoder is trained in a process that gets SIGKILL at a random time, then
in another one that goes on, and so on until it is done; then the next run, till
there were enough kills, spread evenly over the time that a run takes.  Each
process is a fork of one that has imported everything, so that is the time of
what a run does itself: reading text, building, compiling (from a cache),
training, evaluating, writing checkpoints.

    survived           kills after which the same command went on
    identical runs     share of the finished runs whose lines of metrics.jsonl,
                       clocks aside, and parameters are those, bit for bit, of a
                       run that was not killed
    before checkpoint  steps that were redone although a checkpoint on disk held
                       them, at most
    steps redone       at most and in the median, of all that were taken; the
                       checkpoint of so many steps may be being written
"""

import argparse
import functools
import hashlib
import mmap
import os
import random
import signal
import struct
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.training import (
  DataConfig,
  OptimizerConfig,
  TrainConfig,
  progress,
  step,
  train,
)
from adaptivejax.training.checkpoint import steps
from adaptivejax.training.run import read_metrics
from adaptivejax.training.tasks import language_modeling
from benchmarks.harness import Options, Row, main

KILLS, QUICK_KILLS = 50, 3
EVERY = 20
MODEL = DecoderConfig(layers=2, features=16, hidden=32, heads=2, kv_heads=2)
CLOCKS = "seconds", "tokens_per_second"


def config(corpus: Path, quick: bool) -> TrainConfig:
  """Lines, evaluations and checkpoints fall on different steps."""
  return TrainConfig(
    name="victim",
    build=lambda rngs: DecoderLM(MODEL, rngs=rngs),
    loss=language_modeling,
    data=DataConfig(str(corpus), context=32, batch=4, validation=0.2),
    optimizer=OptimizerConfig(warmup=5),
    steps=100 if quick else 300,
    log_every=7,
    eval_every=90,
    eval_batches=2,
    checkpoint_every=EVERY,
  )


class Process:
  """A fork that trains; `first` and `last` are the steps it has begun with and
  come to, 0 before.
  """

  def __init__(self, config: TrainConfig, out: Path):
    self.shared = mmap.mmap(-1, 16)
    self.began = time.perf_counter()
    with warnings.catch_warnings(action="ignore"):  # threads wait for work
      self.pid = os.fork()
    if self.pid == 0:
      try:
        self._live(config, out)
        os._exit(0)
      finally:
        os._exit(1)

  def _live(self, config: TrainConfig, out: Path) -> None:
    def advance(display, step):
      first = self.first or step
      self.shared[:] = struct.pack("qq", first, step)

    setattr(progress.Display, "advance", advance)  # noqa: B010
    result = train(config, out=out, progress=False)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(step.split(result.model)[1]):
      digest.update(np.asarray(leaf).tobytes())
    (out / "digest").write_text(digest.hexdigest())

  @property
  def first(self) -> int:
    return struct.unpack("qq", self.shared[:])[0]

  @property
  def last(self) -> int:
    return struct.unpack("qq", self.shared[:])[1]

  def wait(self, seconds: float | None = None) -> bool:
    """Whether it ends by itself, within so many seconds; else it is killed.

    Raises:
      RuntimeError: it failed.
    """
    while seconds is None or time.perf_counter() - self.began < seconds:
      pid, status = os.waitpid(self.pid, 0 if seconds is None else os.WNOHANG)
      if pid:
        if status:
          raise RuntimeError(f"training failed: {status=}")
        return True
      time.sleep(0.002)
    os.kill(self.pid, signal.SIGKILL)
    os.waitpid(self.pid, 0)
    return False


def outcome(out: Path) -> tuple[list[dict[str, Any]], str]:
  """What must be the same: the log without clocks, and the parameters."""
  lines = [
    {name: x for name, x in line.items() if name not in CLOCKS}
    for line in read_metrics(out)
  ]
  return lines, (out / "digest").read_text()


class Kills:
  """What was found: kills, runs that ended the same, and steps taken again."""

  def __init__(self):
    self.count = self.failed = 0
    self.same: list[bool] = []
    self.redone: list[int] = []
    self.beyond: list[int] = []

  def run(self, start, out: Path, moments: list[float]) -> None:
    """Trains one run to its end, killing it at those moments, the last first.

    One that comes too late, the machine being faster by now, is drawn again.
    """
    reached = on_disk = 0
    done = False
    while not done:
      process = start(out)
      done = process.wait(moments[-1] if moments else None)
      if reached and process.first:
        self.redone.append(reached - process.first + 1)
        self.beyond.append(max(0, on_disk - process.first + 1))
        reached = 0
      if moments and done:
        took = time.perf_counter() - process.began
        moments[-1] = random.uniform(0, took)
      elif not done:
        self.count += 1
        moments.pop()
        reached = process.last or reached
        on_disk = max(steps(out / "checkpoints"), default=0)


def rows(options: Options, kills: int) -> Iterator[Row]:
  """Kills and compares."""
  draw, found = random.Random(0), Kills()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    start = functools.partial(
      Process, config(write_text(folder / "corpus", draw), options.quick)
    )
    for run in ("cold", "warm"):
      process = start(folder / run)
      process.wait()
    duration = time.perf_counter() - process.began
    moments = [duration * (i + draw.random()) / kills for i in range(kills)]
    draw.shuffle(moments)
    while moments:
      out = folder / f"run{found.failed + len(found.same)}"
      try:
        found.run(start, out, moments)
      except RuntimeError:
        found.failed += 1
        moments[-1:] = []
      else:
        found.same.append(outcome(out) == outcome(folder / "warm"))
  exact = functools.partial(_row, f"{kills} kills")
  yield exact("survived", found.count - found.failed, target=kills)
  yield exact("finished runs", len(found.same))
  identical = sum(found.same) / max(len(found.same), 1)
  yield exact("identical runs", identical, target=1)
  beyond, redone = max(found.beyond, default=0), max(found.redone, default=0)
  yield exact("before checkpoint", beyond, lower=True, target=0)
  yield exact("most redone", redone, lower=True, target=2 * EVERY)
  yield Row.of(
    f"{kills} kills", "steps redone", found.redone or [0], better="lower"
  )


def write_text(folder: Path, draw: random.Random) -> Path:
  """A corpus of a few files."""
  folder.mkdir()
  for i in range(40):
    words = draw.choices(["of", "the", "a", "step", "run", "line"], k=200)
    (folder / f"{i}.txt").write_text(" ".join(words))
  return folder


def _row(case, metric, value, *, target=None, lower=False) -> Row:
  better = "lower" if lower else "higher"
  return Row(case, metric, value, (value, value), target, better)


if __name__ == "__main__":
  arguments = argparse.ArgumentParser(add_help=False)
  arguments.add_argument("--kills", type=int)
  found, rest = arguments.parse_known_args()
  usual = QUICK_KILLS if "--quick" in rest else KILLS
  main(__doc__, functools.partial(rows, kills=found.kills or usual), rest)
