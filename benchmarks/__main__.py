# SPDX-License-Identifier: Apache-2.0
"""Runs every benchmark, each in a process of its own, and sums up.

python -m benchmarks [--quick] [--json FILE]
"""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import Row, finish, from_json, parser

SHARED = {"__init__", "__main__", "harness", "measure"}
SHARED |= {"tpu_schedule", "tpu_simulator"}


def names() -> list[str]:
  """The benchmarks: every module here that is not part of the harness."""
  modules = {file.stem for file in Path(__file__).parent.glob("*.py")}
  return sorted(modules - SHARED)


def run(name: str, quick: bool) -> list[Row]:
  """Runs one benchmark; its rows, their cases under its name."""
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "rows.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(out)]
    subprocess.run(command + ["--quick"] * quick, check=True)
    rows = from_json(out.read_text())
  rename = lambda row: dataclasses.replace(row, case=f"{name}: {row.case}")
  return [rename(row) for row in rows]


def main() -> None:
  args = parser(__doc__ or "").parse_args()
  rows: list[Row] = []
  failed = []
  for name in names():
    try:
      rows += run(name, args.quick)
    except subprocess.CalledProcessError as error:
      failed.append(f"{name} (exit {error.returncode})")
  finish(rows, args.json)
  if failed:
    sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
  main()
