# SPDX-License-Identifier: Apache-2.0
"""What a run measures on its way: to its log, its events and the display.

Lines are the same however often the run was stopped between: metrics of steps
that are in no line yet are part of a checkpoint (`Recorder.place`).
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from adaptivejax.training import run
from adaptivejax.training.config import TrainConfig
from adaptivejax.training.progress import Display
from adaptivejax.training.step import Metrics
from adaptivejax.training.watch import Watch


class Recorder:
  """Times the run, and sends its metrics to the log and the display.

  Args:
    config: of the run.
    out: its folder.
    step: after which it goes on.
    place: of a recorder after that step, from a checkpoint; None at the start.
    show: whether there is a display.
    write: whether this process writes.
  """

  def __init__(
    self,
    config: TrainConfig,
    out: Path,
    step: int,
    place: Mapping[str, Any] | None,
    *,
    show: bool,
    write: bool = True,
  ):
    place = place or {"waiting": [], "streak": 0}
    self.tokens = config.data.batch * config.data.context
    self.limit = config.max_skips
    self.log = run.MetricsLog(out, step, write=write)
    self.events = run.Lines(out / run.EVENTS, step, write=write)
    self.watch = Watch(self.log.lines)
    self.display = Display(config.name, step, config.steps, visible=show)
    self.began = time.perf_counter() - self.log.seconds
    self.mark, self.since = time.perf_counter(), 0  # of tokens per second
    self.fresh: list[Metrics] = []  # on the device: nothing waits for them
    self.waiting: list[dict[str, float | None]] = [*place["waiting"]]
    self.streak: int = place["streak"]  # of skipped steps

  def add(self, step: int, metrics: Metrics) -> None:
    """Takes the metrics of a step."""
    self.fresh.append(metrics)
    self.since += 1
    self.display.advance(step)

  def settle(self, step: int) -> None:
    """Waits for the metrics of all steps, up to `step`.

    Raises:
      ValueError: too many steps in a row were skipped; the checkpoints stay.
    """
    found = jax.device_get(self.fresh)
    first = step - len(found) + 1
    self.fresh = []
    for at, metrics in enumerate(found, first):
      values = {name: _logged(float(value)) for name, value in metrics.items()}
      self.waiting.append(values)
      self.streak = self.streak + 1 if values["skipped"] else 0
      if self.streak > self.limit:
        raise ValueError(
          f"the loss is {metrics['loss']} at step {at}, its gradient"
          f" {metrics['gradient_norm']} long: {self.streak} steps in a row were"
          f" not finite, and max_skips={self.limit}. --debug-nans names the"
          " first bad operation; lower optimizer.learning_rate or"
          " optimizer.clip, under another name. The newest checkpoint is from"
          " before"
        )

  @property
  def place(self) -> dict[str, Any]:
    """What a recorder needs to go on after the step that was settled."""
    return {"waiting": self.waiting, "streak": self.streak}

  def write_training(self, step: int) -> None:
    """Logs the mean since the last line, over the steps that were learned from.

    Raises:
      ValueError: see `settle`.
    """
    self.settle(step)
    now = time.perf_counter()
    means = _means(self.waiting)
    means["tokens_per_second"] = self.tokens * self.since / (now - self.mark)
    self.log.write(step, "train", now - self.began, means)
    if skipped := means.get("skipped"):
      text = f"skipped {skipped:.0f} steps whose loss or gradient is not finite"
      self.note(step, "skipped", text)
    for event, text in self.watch.see(self.log.lines[-1]):
      self.note(step, event, text)
    self.display.figures(means)
    self.waiting, self.mark, self.since = [], now, 0

  def write_validation(self, step: int, metrics: Mapping[str, float]) -> None:
    """Logs an evaluation; what cannot be logged was not measured."""
    now = time.perf_counter()
    found = {name: x for name, x in metrics.items() if _logged(x) is not None}
    self.log.write(step, "validation", now - self.began, found)
    self.display.line(step, found)
    self.mark, self.since = now, 0

  def note(self, step: int, event: str, text: str) -> None:
    """Logs what is out of the ordinary, and shows it."""
    self.events.add({"step": step, "event": event, "text": text})
    self.display.say(f"step {step}  {text}")

  def sync(self) -> None:
    """Waits until the lines so far would outlive a crash."""
    self.log.sync()
    self.events.sync()


def _logged(value: float) -> float | None:
  """The value, if a reader of the log takes it."""
  return value if abs(value) <= run.LARGEST else None


def _means(steps: list[dict[str, float | None]]) -> dict[str, float]:
  """The mean of each metric where it is finite, and the `skipped`, if any."""
  learned = [metrics for metrics in steps if not metrics["skipped"]]
  skipped = len(steps) - len(learned)
  means: dict[str, float] = {"skipped": skipped} if skipped else {}
  for name in steps[0]:
    found = [x for metrics in learned if (x := metrics[name]) is not None]
    if found and name != "skipped":
      means[name] = math.fsum(found) / len(found)
  return means
