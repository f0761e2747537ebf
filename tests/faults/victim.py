# SPDX-License-Identifier: Apache-2.0
"""Runs that die where they are told, each in a fork of one process.

    python -m tests.faults.victim FOLDER CORPUS POINT ...

What is slow, importing, is done once.  Prints how each ended, as JSON.
"""

import json
import os
import resource
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path

import jax

from adaptivejax.training import checkpoint, manifest, progress, run, train
from tests.training import tiny

STEPS = {"steps": 8, "log_every": 3, "eval_every": 4, "checkpoint_every": 2}
"""Lines, evaluations and checkpoints do not fall together."""


def config(corpus):
  return tiny.config(corpus, **STEPS)


def die(*_):
  os.kill(os.getpid(), signal.SIGKILL)


def no_room(saved, *_):
  saved.wait()
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))


def ahead(owner, name, when, do):
  """Does something before a call of a function, if its arguments are those."""
  inner = getattr(owner, name)

  def patched(*args, **settings):
    if when(*args):
      do(*args)
    return inner(*args, **settings)

  setattr(owner, name, patched)


def after(owner, name, when, do):
  inner = getattr(owner, name)

  def patched(*args, **settings):
    made = inner(*args, **settings)
    if when(*args):
      do(*args)
    return made

  setattr(owner, name, patched)


def half_a_line(lines, line):
  with lines.path.open("a") as file:
    file.write(json.dumps(line)[:20])
  die()


def half_deleted(path, *_):
  next(p for p in Path(path).rglob("*") if p.is_file()).unlink()
  die()


def of(number, *names):
  """Whether a path is that of a step."""
  return lambda path, *_: Path(path).name in [f"{number}{n}" for n in names]


def at_step(number):
  return lambda *args: args[-1] == number


def saving(number):
  return lambda _, state, *rest: int(state.step) == number


POINTS = {
  "in a step": (ahead, progress.Display, "advance", at_step(7), die),
  "in a line": (
    ahead,
    run.Lines,
    "add",
    lambda _, line: line["step"] == 6,
    half_a_line,
  ),
  "as a checkpoint begins": (
    after,
    checkpoint.Checkpoints,
    "save",
    saving(6),
    die,
  ),
  "before it is sealed": (ahead, manifest, "seal", of(6, ".part"), die),
  "before it is named": (after, manifest, "seal", of(6, ".part"), die),
  "as an old one goes": (ahead, shutil, "rmtree", of(2, ".old"), half_deleted),
  "no room": (ahead, checkpoint.Checkpoints, "save", saving(6), no_room),
}
RESUMES = dict(zip(POINTS, ({4, 6}, {2, 4}, {4, 6}, {4}, {4}, {6}, {4})))
"""Steps of the newest checkpoint that is whole, if it was being written."""


def live(point, corpus, out):
  """The life of a fork: how it ends if it is not killed."""
  change, *how = POINTS[point]
  change(*how)
  try:
    train(config(corpus), out=out, progress=False)
  except OSError as error:
    print(error, flush=True)
    os._exit(2)
  except BaseException:
    traceback.print_exc()
  os._exit(1)


def main(folder, corpus, points):
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_compilation_cache_dir", ".cache/jax")
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  ended = {}
  for point in points:
    out = Path(folder) / point
    said, says = os.pipe()
    with warnings.catch_warnings(action="ignore"):  # threads wait for work
      pid = os.fork()
    if pid == 0:
      os.dup2(says, 1)
      os.dup2(says, 2)
      live(point, corpus, out)
    os.close(says)
    with open(said) as file:
      text = file.read()
    _, status = os.waitpid(pid, 0)
    ended[point] = os.waitstatus_to_exitcode(status), text
  print(json.dumps(ended))


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], sys.argv[3:])
