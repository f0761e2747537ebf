# SPDX-License-Identifier: Apache-2.0
"""Law: a run is the same on any number of processes, stopped and resumed.

Two processes with two devices each, over loopback.  A bug here is a hang, so
all run in subprocesses with a time limit.
"""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from adaptivejax.training.run import read_metrics
from tests.program import ROOT
from tests.training import tiny

SECONDS = 240
MAIN = """
import json, os, sys
from adaptivejax.cli import main
for folder, args in json.loads(sys.argv[1]):
  os.chdir(folder)
  code = main(["train", *args])
sys.exit(code)
"""
CONFIG = ROOT / "tests" / "scale" / "two_processes.py"


def start(devices, *runs, **environment):
  """`adaptivejax train` for each `(folder, flags)`, in a process of its own."""
  env = os.environ | environment
  env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  env |= {"JAX_NUM_CPU_DEVICES": str(devices)}
  todo = [(str(folder), [str(CONFIG), *flags]) for folder, flags in runs]
  return subprocess.Popen(
    [sys.executable, "-W", "error", "-c", MAIN, json.dumps(todo)],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def ends(*processes):
  """Exit codes, what was printed and what was complained of; none hangs."""
  try:
    said = [process.communicate(timeout=SECONDS) for process in processes]
  except subprocess.TimeoutExpired:
    for process in processes:
      process.kill()
    told = [process.communicate()[1][-2000:] for process in processes]
    pytest.fail("a hang: " + "\n".join(told))
  ours = lambda out: [x for x in out.splitlines() if not x.startswith("[Gloo]")]
  return [
    (process.returncode, ours(out), err)
    for process, (out, err) in zip(processes, said)
  ]


def two(folder, *flags, **environment):
  """Two processes of two devices each."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  meet = ("--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process")
  both = [(folder, (*flags, *meet, str(i))) for i in range(2)]
  return ends(*(start(2, one, **environment) for one in both))


def losses(folder):
  lines = read_metrics(folder / "runs" / "run")
  return [
    (line["step"], line["split"], line.get("loss", line.get("bits_per_byte")))
    for line in lines
  ]


def test_two_processes_stop_together_and_one_goes_on(tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  for folder in (whole, parts):
    folder.mkdir()
    tiny.write_corpus(folder / "corpus")

  # Process 1 is told to stop in step 3: step 4 is the first both know of it.
  mesh = ("--mesh.expert", "2", "--mesh.model", "2")
  first, second = two(parts, *mesh, STOP_AT="3")
  assert first[0] == second[0] == 128 + signal.SIGTERM, first[2] + second[2]
  assert first[1][-1].startswith("stopped after step 4") and not second[1]
  assert [p.name for p in (parts / "runs/run/checkpoints").glob("4")]
  rows = [(parts / f"reads{i}").read_text().split() for i in range(2)]
  assert {*rows[0]} == {*"0123"} and {*rows[1]} == {*"4567"}
  stopped = losses(parts)

  other = ("--mesh.data", "2", "--mesh.fsdp", "2")
  cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
  one = start(4, (whole, mesh), (parts, other), **cache)
  ((code, _, err),) = ends(one)
  assert code == 0, err
  want, got = losses(whole), losses(parts)
  assert stopped == want[: len(stopped)] and stopped[-1][0] == 4  # exactly
  assert [line[:2] for line in got] == [line[:2] for line in want]
  # On another mesh sums are in another order.
  values = lambda lines: [line[2] for line in lines]
  np.testing.assert_allclose(values(got), values(want), rtol=2e-5)
