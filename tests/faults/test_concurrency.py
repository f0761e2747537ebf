# SPDX-License-Identifier: Apache-2.0
"""Law: who writes in a run writes alone; who reads it is right or refused."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax import report
from adaptivejax.training import checkpoint, lock, run, train
from adaptivejax.training.step import TrainState
from tests.faults import victim

HOLD = """
import pathlib, runpy, sys, time
locked = runpy.run_path(sys.argv[1])["locked"]
with locked(pathlib.Path(sys.argv[2])):
  print("held", flush=True)
  time.sleep(60)
"""


@contextlib.contextmanager
def during(work):
  """Repeats `work` in a thread, and fails if it fails."""
  over, failed = threading.Event(), []

  def loop():
    try:
      i = 0
      while not over.is_set():
        i += 1
        work(i)
    except BaseException as error:
      failed.append(error)

  thread = threading.Thread(target=loop)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join(60)
  assert not thread.is_alive() and not failed, failed


def test_a_living_process_keeps_its_run_and_a_dead_one_does_not(
  corpus, whole, tmp_path
):
  out = shutil.copytree(whole, tmp_path / "run")
  before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
  command = [sys.executable, "-c", HOLD, lock.__file__, str(out)]
  holder = subprocess.Popen(command, stdout=subprocess.PIPE)
  try:
    assert holder.stdout.readline() == b"held\n"
    match = f"is being written by process {holder.pid} on .*: wait for it, stop"
    with pytest.raises(ValueError, match=match):
      train(victim.config(corpus), out=out, progress=False)
    after = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    before[out / lock.NAME] = after[out / lock.NAME]
    assert after == before
  finally:
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
  assert train(victim.config(corpus), out=out, progress=False).step == 8
  said = (out / lock.NAME).read_text()
  assert said.startswith(f"process {os.getpid()} on ")


def test_one_process_does_not_train_a_run_twice(tmp_path):
  with (
    run.claim(tmp_path / "run"),
    pytest.raises(ValueError, match="is being written by process"),
    run.claim(tmp_path / "run"),
  ):
    pass
  with run.claim(tmp_path / "run"):
    pass


def test_a_folder_without_locks_is_refused(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(lock.fcntl, "flock", flock)
  with (
    pytest.raises(ValueError, match="without locks .*keep runs/ on another"),
    run.claim(tmp_path / "run"),
  ):
    pass


def test_a_claim_that_died_early_is_taken_over(tmp_path):
  out = tmp_path / "run"
  out.mkdir()
  (out / lock.NAME).write_text("process 1 on earth")
  with run.claim(out):
    pass
  (out / ".run.json.77.part").write_text('{"st')
  with run.claim(out):
    assert {p.name for p in out.iterdir()} == {lock.NAME, run.RECORD}


def test_a_report_made_while_training_writes_has_whole_lines(tmp_path):
  out = tmp_path / "run"
  with run.claim(out):
    log = run.MetricsLog(out, 0)
    log.write(1, "train", 0.0, {"loss": 1.0})

    def work(i):
      log.write(i + 1, "train", 0.1 * i, {"loss": float(i + 1)})
      folder = out / "checkpoints" / f"{i}.part"
      folder.mkdir(parents=True)
      folder.rmdir()
      if i % 50 == 0:  # the run was stopped, and goes on
        run.MetricsLog(out, i + 1)

    with during(work):
      for _ in range(4):
        report.rebuild(out)
        (curve,) = json.loads((out / "report.json").read_text())["curves"]
        assert curve["loss"] == [float(step) for step in curve["steps"]]
        assert curve["steps"] == list(range(1, len(curve["steps"]) + 1))


def test_a_reader_gets_one_checkpoint_whole_while_they_come_and_go(tmp_path):
  folder = tmp_path / "run" / "checkpoints"
  like = {"a": jnp.zeros(3000), "b": {"c": jnp.zeros((40, 5))}}
  state = lambda i: TrainState(
    jnp.int32(i), jax.tree.map(lambda a: a + i, like), ()
  )
  with checkpoint.Checkpoints(folder, {}, keep=1) as checkpoints:
    checkpoints.save(state(1), None)
    checkpoints.wait()
    with during(lambda i: checkpoints.save(state(i + 1), None)):
      seen, deadline = [], time.monotonic() + 60
      while len({*seen}) < 4 and time.monotonic() < deadline:
        leaves = jax.tree.leaves(checkpoint.load_params(folder, like))
        (value,) = {float(x) for leaf in leaves for x in np.ravel(leaf)}
        seen.append(value)
  assert seen == sorted(seen) and len({*seen}) == 4
