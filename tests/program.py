# SPDX-License-Identifier: Apache-2.0
"""Programs that tests run in a process of their own, with a time limit.

A bug in a collective is a hang, and the number of devices is fixed when JAX
starts.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_in_subprocess(preamble, code, timeout=120):
  """Runs `code` after `preamble`; fails if it fails, warns, or hangs."""
  program = preamble + textwrap.dedent(code)
  command = [sys.executable, "-W", "error", "-c", program]
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(
    command,
    cwd=ROOT,
    env=env,
    timeout=timeout,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
