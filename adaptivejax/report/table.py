# SPDX-License-Identifier: Apache-2.0
"""The points of a report on the terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adaptivejax.report.data import Point, Report
from adaptivejax.report.words import number, percent, times

HEADS = ("bits/byte", "vs dense", "FLOPs", "tokens/s", "speed", "")


def print_table(report: Report, console: Console | None = None) -> None:
  """Prints a table for each regime, and how many points lost to dense."""
  console = console or Console()
  for regime in report.regimes():
    console.print(_table(report, regime))
  adaptive = [p for p in report.points if not p.dense]
  if adaptive:
    console.print(
      f"{len(report.slower())} of {len(adaptive)} adaptive points are slower"
      " than dense by the clock.",
      highlight=False,
    )


def _table(report: Report, regime: str) -> Table:
  """One row for each point, under a row with the name of its method."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column(regime)
  for name in HEADS:
    table.add_column(name, justify="right", no_wrap=True)
  last = None
  for point in report.points:
    if point.regime != regime:
      continue
    if point.method != last:
      table.add_row(f"[bold]{escape(point.method)}")
    table.add_row(*_cells(report, point))
    last = point.method
  return table


def _cells(report: Report, p: Point) -> tuple[str, ...]:
  loss = "" if p.dense else percent(report.loss_of_quality(p), signed=True)
  return (
    f"  {escape(p.setting)}",
    number(p.bits_per_byte, 4),
    loss,
    percent(p.flops_share),
    number(p.tokens_per_second),
    times(p.speedup),
    "[bold red]slower" if p.slower else "",
  )
