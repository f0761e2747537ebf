# SPDX-License-Identifier: Apache-2.0
"""Measures the headlines of the methods beside the papers' claims.

  python -m benchmarks.headlines [NAME ...] [--quick] [--write]

All of them if none is named.  `--write` keeps the results, which METHODS.md
shows.  Shared models are trained once, in minutes, under runs/headlines.
"""

import argparse
import dataclasses
import importlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adaptivejax.report import environment, write_atomically
from benchmarks.headlines import Headline

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
SHARED = {
  "__init__",
  "__main__",
  "beds",
  "classifiers",
  "lessons",
  "mixtures",
  "needles",
  "photos",
  "prefill",
  "routed",
}
MARKS = {True: "[green]✓", False: "[red]✗", None: "-"}


def names() -> list[str]:
  """The headlines: every module here that they do not share."""
  return sorted({file.stem for file in FOLDER.glob("*.py")} - SHARED)


def main(argv: Sequence[str] | None = None) -> None:
  args = _arguments(argv)
  console = Console()
  if not console.is_terminal:  # a log or a pipe: never fold a line
    console = Console(width=160)
  chosen, found, failed = args.names or names(), {}, []
  for i, name in enumerate(chosen, 1):
    console.print(f"[bold]{i}/{len(chosen)} {name}[/]", end=" ")
    start = time.perf_counter()
    try:
      module = importlib.import_module(f"{__package__}.{name}")
      headline = module.measure(args.quick)
    except Exception as error:
      failed.append(name)
      console.print(escape(f"failed: {type(error).__name__}: {error}"))
      continue
    seconds = time.perf_counter() - start
    line = escape(f"{headline.text} ({seconds:.0f} s)")
    console.print(MARKS[headline.holds], line)
    found[name] = entry(name, module.PAPER, headline)
    if args.write:  # at once: a later failure costs nothing
      keep(found[name], name)
  console.print(table(found))
  if args.quick:
    console.print("a smoke run: these figures mean nothing")
  if failed:
    sys.exit(f"failed: {', '.join(failed)}")


def entry(name: str, paper: str, headline: Headline) -> dict[str, Any]:
  """A result as it is kept."""
  return {
    "paper": paper,
    **dataclasses.asdict(headline),
    "figures": {k: _finite(v) for k, v in headline.figures.items()},
    "command": f"python -m benchmarks.headlines {name}",
    "on": environment(),
  }


def keep(result: dict[str, Any], name: str, path: Path = RESULTS) -> None:
  """Puts one result into the file of all; those of other methods stay."""
  results = json.loads(path.read_text("utf-8")) if path.is_file() else {}
  results = dict(sorted({**results, name: result}.items()))
  text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
  write_atomically({path: text + "\n"})


def table(results: dict[str, dict[str, Any]]) -> Table:
  """One line for each method."""
  out = Table(title="Headlines", title_justify="left", title_style="bold")
  for column in ("method", "paper's claim", "measured here", "holds"):
    out.add_column(column, no_wrap=column == "method")
  for name, found in results.items():
    claim, text = escape(found["paper"]), escape(found["text"])
    out.add_row(name, claim, text, MARKS[found["holds"]])
  return out


def _finite(value: float) -> float | None:
  """JSON has no NaN and no infinity: they become null."""
  return float(value) if math.isfinite(value) else None


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
  cli = argparse.ArgumentParser(
    prog="python -m benchmarks.headlines",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  cli.add_argument("names", nargs="*", metavar="NAME", help="of a method")
  cli.add_argument("--quick", action="store_true", help="a smoke run")
  cli.add_argument(
    "--write", action="store_true", help=f"keep them in {RESULTS.name}"
  )
  args = cli.parse_args(argv)
  unknown = sorted(set(args.names) - set(names()))
  if unknown:
    cli.error(
      f"no headline {', '.join(unknown)}; there are {', '.join(names())}"
    )
  if args.quick and args.write:
    cli.error("--quick measures nothing worth keeping: leave out --write")
  return args


if __name__ == "__main__":
  main()
