# SPDX-License-Identifier: Apache-2.0
"""What a person sees of a run, and how they stop it."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)


class Display:
  """A bar with the loss, tokens per second, realised compute and time left.

  Evaluations are lines above the bar, also where there is no terminal.
  """

  def __init__(self, name: str, step: int, steps: int, *, visible: bool):
    console = Console(quiet=not visible)
    self.bar = Progress(
      TextColumn("{task.description}"),
      BarColumn(bar_width=24),
      MofNCompleteColumn(),
      TextColumn("{task.fields[figures]}"),
      TimeRemainingColumn(),
      console=console,
      disable=not console.is_terminal,
    )
    self.name = name
    self.task = self.bar.add_task(
      name, total=steps, completed=step, figures="compiling"
    )

  def __enter__(self):
    self.bar.start()
    return self

  def __exit__(self, *error):
    self.bar.stop()

  def advance(self, step: int) -> None:
    """Moves the bar to `step`."""
    self.bar.update(self.task, completed=step)

  def figures(self, metrics: Mapping[str, float]) -> None:
    """Shows the newest metrics of training beside the bar."""
    self.bar.update(self.task, figures=_figures(metrics))

  def line(self, step: int, metrics: Mapping[str, float]) -> None:
    """Prints an evaluation."""
    self.say(f"step {step}  {_figures(metrics)}")

  def say(self, text: str) -> None:
    """Prints a line."""
    line = f"{self.name}  {text}"
    self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)


class Stop:
  """The first SIGINT or SIGTERM: `number`, 0 while there is none."""

  number = 0


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
  """Turns the first SIGINT or SIGTERM into a request; the second one kills.

  Signals reach the main thread only: elsewhere this changes nothing.
  """
  stop = Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  numbers = (signal.SIGINT, signal.SIGTERM)
  before = {number: signal.getsignal(number) for number in numbers}

  def restore():
    for number, handler in before.items():
      signal.signal(number, handler)

  def request(number, frame):
    stop.number = number
    restore()

  for number in numbers:
    signal.signal(number, request)
  try:
    yield stop
  finally:
    restore()


FIGURES = {
  "loss": "loss {:.3f}",
  "bits_per_byte": "{:.3f} bits/byte",
  "tokens_per_second": "{:,.0f} tokens/s",
  "share": "compute {:.0%}",
  "skipped": "{:.0f} skipped",
}


def _figures(metrics: Mapping[str, float]) -> str:
  return "  ".join(
    form.format(metrics[name])
    for name, form in FIGURES.items()
    if name in metrics
  )
