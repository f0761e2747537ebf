# SPDX-License-Identifier: Apache-2.0
"""Law: importing the packages computes nothing and needs no extra."""

import subprocess
import sys

PROBE = """
import sys
import jax
def refuse(*args, **kwargs):
  raise AssertionError("a backend was started by an import")
jax._src.xla_bridge.backends = refuse
import adaptivejax, adaptivejax.io, pallas_kernels
assert not {"gguf", "grain", "matplotlib", "tokenizers"} & set(sys.modules)
"""


def test_import_computes_nothing():
  run = subprocess.run(
    [sys.executable, "-W", "error", "-c", PROBE], capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr
