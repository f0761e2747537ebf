# SPDX-License-Identifier: Apache-2.0
"""Law: a run is the same on any number of processes, stopped and resumed.

Two processes with two devices each, over loopback.  A bug here is a hang, so
all run in subprocesses with a time limit.
"""

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
MAIN = "import sys; from adaptivejax.cli import main; sys.exit(main(sys.argv[1:]))"
CONFIG = ROOT / "tests" / "scale" / "two_processes.py"


def start(folder, devices, *flags, **environment):
  """`adaptivejax train` in `folder`, in a process with so many devices."""
  folder.mkdir(exist_ok=True)
  if not (folder / "corpus").exists():
    tiny.write_corpus(folder / "corpus")
  env = os.environ | environment
  env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  env |= {"JAX_NUM_CPU_DEVICES": str(devices)}
  command = [sys.executable, "-W", "error", "-c", MAIN, "train", str(CONFIG)]
  return subprocess.Popen(
    [*command, *flags],
    cwd=folder,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def ends(processes):
  """Exit codes, what was printed and what was complained of; none hangs."""
  try:
    said = [process.communicate(timeout=SECONDS) for process in processes]
  except subprocess.TimeoutExpired:
    for process in processes:
      process.kill()
    told = [process.communicate()[1][-2000:] for process in processes]
    pytest.fail("a hang: " + "\n".join(told))
  return [(p.returncode, out, err) for p, (out, err) in zip(processes, said)]


def two(folder, *flags, **environment):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  meet = ("--coordinator", f"127.0.0.1:{port}", "--processes", "2")
  both = [(*flags, *meet, "--process", str(i)) for i in range(2)]
  return ends([start(folder, 2, *one, **environment) for one in both])


def losses(folder):
  lines = read_metrics(folder / "runs" / "run")
  return [
    (line["step"], line["split"], line.get("loss", line.get("bits_per_byte")))
    for line in lines
  ]


def test_two_processes_stop_together_and_one_goes_on(tmp_path):
  mesh = ("--mesh.expert", "2", "--mesh.model", "2")
  ((code, _, err),) = ends([start(tmp_path / "one", 4, *mesh)])
  assert code == 0, err
  whole = losses(tmp_path / "one")

  # Process 1 is told to stop in step 3: step 4 is the first both know of it.
  folder = tmp_path / "two"
  first, second = two(folder, *mesh, STOP_AT="3")
  assert first[0] == second[0] == 128 + signal.SIGTERM, first[2] + second[2]
  assert "stopped after step 4" in first[1] and not second[1]
  assert [p.name for p in (folder / "runs/run/checkpoints").glob("4")]
  part = losses(folder)
  assert part == whole[: len(part)] and part[-1][0] == 4
  rows = [[*map(int, (folder / f"reads{i}").open())] for i in range(2)]
  assert {*rows[0]} == {0, 1, 2, 3} and {*rows[1]} == {4, 5, 6, 7}

  # On another mesh sums are in another order.
  ((code, _, err),) = ends([start(folder, 2, "--mesh.data", "2")])
  assert code == 0, err
  rest = losses(folder)
  assert [line[:2] for line in rest] == [line[:2] for line in whole]
  values = lambda lines: [line[2] for line in lines]
  np.testing.assert_allclose(values(rest), values(whole), rtol=2e-5)
