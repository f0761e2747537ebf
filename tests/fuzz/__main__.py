# SPDX-License-Identifier: Apache-2.0
"""Fuzzes every parser and the command line, guided by coverage.

    make fuzz FILES=20000
    python -m tests.fuzz --files 500 gguf report     # some targets

Needs atheris (`pip install 'adaptivejax[fuzz]'`).  Each target runs in a
process of its own, from files that are made in code.  A file that crashes it
is kept in `runs/fuzz`; one that takes over 30 seconds is a hang.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.fuzz.targets import TARGETS

OUT = Path("runs/fuzz")
HANG = 30


def fuzz(name: str, files: int, seconds: int, seed: int):
  """`(files tried, seconds, crashes, hangs)` of a target."""
  slug = name.replace(" ", "-")
  with tempfile.TemporaryDirectory() as corpus:
    for i, data in enumerate(TARGETS[name].seeds()):
      (Path(corpus) / str(i)).write_bytes(data)
    command = [
      *(sys.executable, "-m", "tests.fuzz.worker", name, corpus),
      *(f"-runs={files}", f"-max_total_time={seconds}", f"-timeout={HANG}"),
      *(f"-artifact_prefix={OUT}/{slug}-", "-rss_limit_mb=6000"),
      *(f"-seed={seed}", "-max_len=300000", "-len_control=0"),
    ]
    log = OUT / f"{slug}.log"
    with log.open("w") as file:
      code = subprocess.run(command, stdout=file, stderr=file).returncode
  text = log.read_text(errors="replace")
  done = re.findall(r"Done (\d+) runs in (\d+) second", text)
  tried = re.findall(r"^#(\d+)\s", text, re.M)
  hangs = "libFuzzer: timeout" in text
  count = int(done[-1][0]) if done else int(tried[-1]) if tried else 0
  lasted = int(done[-1][1]) if done else 0
  crashes = code != 0 and not hangs
  if code:
    print(f"{name}: see {log}", file=sys.stderr)
  return count, lasted, int(crashes), int(hangs)


def main(argv=None) -> int:
  cli = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  cli.add_argument("targets", nargs="*", metavar="TARGET")
  cli.add_argument("--files", type=int, default=20_000, help="in all")
  cli.add_argument("--seconds", type=int, default=300, help="of a target")
  cli.add_argument("--seed", type=int, default=1)
  args = cli.parse_args(argv)
  names = args.targets or list(TARGETS)
  if unknown := set(names) - set(TARGETS):
    cli.error(f"no target {min(unknown)!r}; there are {', '.join(TARGETS)}")
  if find_spec("atheris") is None:
    print("atheris is missing: pip install 'adaptivejax[fuzz]'")
    return 2
  OUT.mkdir(parents=True, exist_ok=True)
  table = Table("target", "files", "seconds", "crashes", "hangs")
  total = [0, 0, 0, 0]
  for name in names:
    found = fuzz(name, -(-args.files // len(names)), args.seconds, args.seed)
    table.add_row(name, *map(str, found))
    total = [a + b for a, b in zip(total, found)]
  Console().print(table)
  print(f"{total[0]} files tried, {total[2]} crashes, {total[3]} hangs")
  return 1 if total[2] or total[3] else 0


if __name__ == "__main__":
  sys.exit(main())
