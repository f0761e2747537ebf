# SPDX-License-Identifier: Apache-2.0
"""Law: a run that died anywhere goes on to what it would have been.

Bit for bit: parameters, moments, every line of the log, each step once.
"""

import json
import signal
import subprocess
import sys

import pytest

from tests.faults import victim
from tests.program import ROOT


@pytest.fixture(scope="module")
def dead(corpus, tmp_path_factory):
  """Runs that died, and how."""
  folder = tmp_path_factory.mktemp("dead")
  command = [sys.executable, "-W", "error", "-m", victim.__name__]
  done = subprocess.run(
    [*command, str(folder), str(corpus), *victim.POINTS],
    cwd=ROOT,
    timeout=200,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return folder, json.loads(done.stdout)


@pytest.mark.parametrize("point", victim.POINTS)
def test_a_run_that_died_goes_on(dead, goes_on, point):
  folder, ended = dead
  code, said = ended[point]
  if point == "no room":
    assert code == 2, said
    assert "the checkpoint of step 6 could not be written" in said
    assert "make room" in said and "Traceback" not in said
  else:
    assert code == -signal.SIGKILL, said
  assert goes_on(folder / point) in victim.RESUMES[point]
