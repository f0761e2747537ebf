# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: rows with targets, a table, JSON, a command line.

A benchmark is a module with a generator of rows and three lines at its end:

    def rows(options: Options) -> Iterator[Row]: ...

    if __name__ == "__main__":
      main(__doc__, rows)

Measuring itself is in `benchmarks.measure`.
"""

import argparse
import dataclasses
import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from adaptivejax.report import environment, write_atomically
from adaptivejax.report.clock import quartiles


@dataclasses.dataclass(frozen=True)
class Row:
  """One figure: a median with its quartiles, and the target if it has one."""

  case: str
  metric: str
  value: float
  spread: tuple[float, float]
  target: float | None = None
  better: Literal["higher", "lower"] = "higher"

  @classmethod
  def of(
    cls,
    case: str,
    metric: str,
    values: Sequence[float],
    *,
    target: float | None = None,
    better: Literal["higher", "lower"] = "higher",
  ) -> "Row":
    """The median of `values` and their quartiles."""
    low, middle, high = quartiles(values)
    return cls(case, metric, middle, (low, high), target, better)

  @property
  def met(self) -> bool | None:
    """Whether the value reaches the target; None if there is none."""
    if self.target is None:
      return None
    if self.better == "higher":
      return self.value >= self.target
    return self.value <= self.target

  @property
  def goal(self) -> str:
    """The target in words, such as `>= 0.93`."""
    sign = ">=" if self.better == "higher" else "<="
    return "" if self.target is None else f"{sign} {self.target:.4g}"


class UnknownCase(ValueError):
  """A pattern of `--cases` that names nothing."""


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command line asks of a benchmark."""

  quick: bool = False
  cases: tuple[str, ...] = ()

  def select(self, names: Iterable[str]) -> list[str]:
    """Those of `names` that match a pattern of `--cases`; without it, all."""
    names = list(names)
    for pattern in self.cases:
      if not fnmatch.filter(names, pattern):
        raise UnknownCase(
          f"--cases {pattern!r} names no case; there are {', '.join(names)}"
        )
    wanted = lambda name: any(fnmatch.fnmatch(name, p) for p in self.cases)
    return [name for name in names if not self.cases or wanted(name)]


def summary(rows: Iterable[Row]) -> str:
  """The closing line: how many targets are met, and the names of the missed."""
  judged = [row for row in rows if row.met is not None]
  if not judged:
    return "no figure of this run has a target"
  missed = [row for row in judged if not row.met]
  line = f"{len(judged) - len(missed)} of {len(judged)} targets met"
  named = [
    f"{r.case} {r.metric} ({r.value:.3g}, target {r.goal})" for r in missed
  ]
  return line + (f"; missed: {'; '.join(named)}" if named else "")


def table(title: str, rows: Iterable[Row]) -> Table:
  """All rows, one section for each case."""
  out = Table(title=title, title_justify="left", title_style="bold")
  for name in ("case", "metric"):
    out.add_column(name)
  for name in ("value", "quartiles", "target"):
    out.add_column(name, justify="right", no_wrap=True)
  out.add_column("")
  marks = {None: "", True: "[green]✓ met", False: "[red]✗ missed"}
  last = None
  for row in rows:
    if last not in (None, row.case):
      out.add_section()
    low, high = (f"{x:.3g}" for x in row.spread)
    name = "" if row.case == last else row.case
    value = f"{row.value:.3g}"
    out.add_row(
      name, row.metric, value, f"{low} – {high}", row.goal, marks[row.met]
    )
    last = row.case
  return out


def to_json(rows: Iterable[Row]) -> str:
  """The JSON form of a run: `{"environment": {...}, "rows": [...]}`."""
  record = {
    "environment": environment(),
    "rows": [_finite(dataclasses.asdict(row)) for row in rows],
  }
  return json.dumps(record, indent=2, allow_nan=False) + "\n"


def from_json(text: str) -> list[Row]:
  """The rows of `to_json`."""
  nan = lambda x: math.nan if x is None else x
  return [
    Row(
      **row
      | {"value": nan(row["value"]), "spread": (*map(nan, row["spread"]),)}
    )
    for row in json.loads(text)["rows"]
  ]


def _finite(x: Any) -> Any:
  """NaN and infinity, which JSON does not have, become null."""
  if isinstance(x, dict):
    return {key: _finite(value) for key, value in x.items()}
  if isinstance(x, (list, tuple)):
    return [_finite(value) for value in x]
  return None if isinstance(x, float) and not math.isfinite(x) else x


def finish(rows: Sequence[Row], json_file: Path | None) -> None:
  """Prints the closing line, and writes the JSON file."""
  print(summary(rows), flush=True)
  if json_file:
    write_atomically({json_file: to_json(rows)})


def parser(description: str) -> argparse.ArgumentParser:
  """The command line that every benchmark and the runner of all have."""
  out = argparse.ArgumentParser(
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  out.add_argument("--json", type=_file, metavar="FILE", help="write the rows")
  out.add_argument(
    "--quick", action="store_true", help="a smoke run on tiny shapes"
  )
  return out


def _file(text: str) -> Path:
  """A path in a folder that exists: known before minutes of measuring."""
  path = Path(text)
  if not path.parent.is_dir() or path.is_dir():
    raise argparse.ArgumentTypeError(
      f"cannot write {text!r}: it must be a file in a folder that exists"
    )
  return path


def main(
  doc: str | None,
  rows: Callable[[Options], Iterable[Row]],
  argv: Sequence[str] | None = None,
) -> None:
  """Runs one benchmark as a command."""
  doc = doc or ""
  cli = parser(doc)
  cli.add_argument(
    "--cases", nargs="+", default=(), metavar="GLOB", help="only these cases"
  )
  args = cli.parse_args(argv)
  options = Options(args.quick, tuple(args.cases))
  done: list[Row] = []
  try:
    with Console(stderr=True).status("warming up") as status:
      for row in rows(options):
        done.append(row)
        status.update(f"{row.case}: {row.metric} done")
  except UnknownCase as error:
    cli.error(str(error))
  console = Console()
  if not console.is_terminal:  # a log or a pipe: never fold a column
    console = Console(width=120)
  console.print(table(doc.partition("\n")[0], done))
  finish(done, args.json)
