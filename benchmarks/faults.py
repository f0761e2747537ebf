"""Is a run that was killed, again and again, the run that was not?

python -m benchmarks.faults [--kills 50] [--quick] [--json FILE]

A small decoder is trained in a process that gets SIGKILL at a random time, then
in another one that goes on, and so on until it is done; then the next run, until
there were so many kills, spread evenly over the time that a run takes.  Each process is a fork of one that has imported
everything, so the times are over what a run does itself: reading text, building,
compiling (from a cache), training, evaluating, writing checkpoints.

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
import json
import mmap
import os
import random
import shutil
import signal
import statistics
import struct
import tempfile
import time
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
  come to, 0 before."""

  def __init__(self, config: TrainConfig, out: Path):
    self.shared = mmap.mmap(-1, 16)
    self.began = time.perf_counter()
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


def rows(options: Options, kills: int) -> Iterator[Row]:
  """Kills and compares."""
  draw = random.Random(0)
  with tempfile.TemporaryDirectory() as folder:
    corpus = Path(folder) / "corpus"
    corpus.mkdir()
    for i in range(40):
      words = (
        draw.choice("of the a step run line".split()) for _ in range(200)
      )
      (corpus / f"{i}.txt").write_text(" ".join(words))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder) / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    what = config(corpus, options.quick)
    for name in ("cold", "whole"):
      process = Process(what, Path(folder) / name)
      process.wait()
    duration = time.perf_counter() - process.began
    whole = outcome(Path(folder) / "whole")
    at = [duration * (i + draw.random()) / kills for i in range(kills)]
    draw.shuffle(at)
    killed, same, redone, beyond = 0, [], [], []
    out = Path(folder) / "run"
    reached = on_disk = None
    while killed < kills or out.exists():
      process = Process(what, out)
      limit = at[killed] if killed < kills else None
      done = process.wait(limit)
      if reached is not None and process.first:
        redone.append(reached - process.first + 1)
        beyond.append(max(0, on_disk - process.first + 1))
        reached = None
      if done:
        same.append(outcome(out) == whole)
        shutil.rmtree(out)
        reached = on_disk = None
        continue
      killed += 1
      reached = max(process.last, reached or 0)
      on_disk = max(steps(out / "checkpoints"), default=0)
  case = f"{killed} kills"
  exact = functools.partial(_row, case)
  yield exact("survived", killed, target=kills)
  yield exact("finished runs", len(same))
  yield exact("identical runs", sum(same) / len(same), target=1)
  yield exact("before checkpoint", max(beyond, default=0), lower=True, target=0)
  yield Row.of(case, "steps redone", redone or [0], better="lower")
  most = 2 * EVERY
  yield exact("most redone", max(redone, default=0), lower=True, target=most)


def _row(case, metric, value, *, target=None, lower=False) -> Row:
  better = "lower" if lower else "higher"
  return Row(case, metric, value, (value, value), target, better)


if __name__ == "__main__":
  arguments = argparse.ArgumentParser(add_help=False)
  arguments.add_argument("--kills", type=int)
  found, rest = arguments.parse_known_args()
  usual = QUICK_KILLS if "--quick" in rest else KILLS
  main(__doc__, functools.partial(rows, kills=found.kills or usual), rest)
