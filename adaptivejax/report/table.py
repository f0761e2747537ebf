# SPDX-License-Identifier: Apache-2.0
"""The points of a report on the terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adaptivejax.report.data import Point, Report, real
from adaptivejax.report.words import number, percent, times

HEADS = ("bits/byte", "vs dense", "FLOPs", "tokens/s", "speed", "")
PERPLEXITY = ("perplexity", "rise")


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
  points = [p for p in report.points if p.regime == regime]
  by_token = any(real(p.perplexity) for p in points)
  for name in (PERPLEXITY if by_token else HEADS[:2]) + HEADS[2:]:
    table.add_column(name, justify="right", no_wrap=True)
  last = None
  for point in points:
    if point.method != last:
      table.add_row(f"[bold]{escape(point.method)}")
    table.add_row(*_cells(report, point, by_token))
    last = point.method
  return table


def _cells(report: Report, p: Point, by_token: bool) -> tuple[str, ...]:
  loss = report.rise(p) if by_token else report.loss_of_quality(p)
  return (
    f"  {escape(p.setting)}",
    number(p.perplexity if by_token else p.bits_per_byte, 4),
    "" if p.dense else percent(loss, signed=True),
    percent(p.flops_share),
    number(p.tokens_per_second),
    times(p.speedup),
    "[bold red]slower" if p.slower else "",
  )
