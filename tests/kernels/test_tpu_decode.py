"""Law: the TPU compiler takes the decode kernel, as fast as memory allows."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.harness import from_json

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs the compiler of TPUs: pip install 'adaptivejax[aot-tpu]'",
)
def test_kernels_compile_and_reach_their_targets(tmp_path):
  """In a process of its own: the compiler reads its flags once."""
  out = tmp_path / "cycles.json"
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.tpu_decode", "--json", out],
    cwd=ROOT, capture_output=True, text=True, timeout=1800,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = from_json(out.read_text())
  assert len({row.case for row in rows}) == 15
  if not jax.__version__.startswith("0.10."):
    pytest.skip("it compiles; the targets are for the compiler of jax 0.10")
  missed = [r for r in rows if r.target and r.value < r.target]
  assert not missed, [f"{r.case}: {r.metric} {r.value}" for r in missed]
