# SPDX-License-Identifier: Apache-2.0
"""Makes the report of a run folder again, from what the run left there."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaptivejax.report.data import Curve, Report
from adaptivejax.report.store import load_report, write_report
from adaptivejax.training.run import METRICS, read_metrics


def rebuild(run_dir: Path) -> Path:
  """Writes the report of a run, `adaptivejax report RUN`; the HTML's path.

  What was measured into `report.json` is rendered again.  A folder that holds
  training runs only gets their curves, as they are by now.
  """
  if not run_dir.is_dir():
    raise ValueError(f"{run_dir} is not a folder: name one of runs/")
  if (run_dir / "report.json").exists():
    report = load_report(run_dir)
    if report != Report(  # more than curves, which are read again
      report.title, report.command, report.environment, curves=report.curves
    ):
      return write_report(report, run_dir)
  found = sorted(_runs(run_dir))
  curves = [
    curve(folder, str(folder.relative_to(run_dir.parent))) for folder in found
  ]
  if not any(c.steps for c in curves):
    raise ValueError(
      f"{run_dir} holds neither report.json nor a line of metrics.jsonl:"
      " nothing was measured there yet"
    )
  command = shlex.join(["adaptivejax", "report", str(run_dir)])
  report = Report(f"Training of {run_dir.name}", command, {}, curves=(*curves,))
  return write_report(report, run_dir)


def _runs(folder: Path) -> Iterator[Path]:
  """Folders of runs at or below; checkpoints come and go, and hold none."""
  for parent, below, names in os.walk(folder):
    if METRICS in names:
      yield Path(parent)
      below[:] = [name for name in below if name != "checkpoints"]


def curve(folder: Path, name: str) -> Curve:
  """The training curve of one run, from its `metrics.jsonl`."""
  steps: dict[int, dict[str, Any]] = {}
  for line in read_metrics(folder):
    entry = steps.setdefault(line["step"], {})
    entry["seconds"] = line["seconds"]
    entry |= {f"{line['split']}/{key}": x for key, x in line.items()}
  column = lambda key: tuple(steps[step].get(key) for step in sorted(steps))
  imbalance = column("train/imbalance")
  return Curve(
    name,
    steps=tuple(sorted(steps)),
    loss=column("train/loss"),
    val_bits_per_byte=column("validation/bits_per_byte"),
    seconds=column("seconds"),
    imbalance=imbalance if any(imbalance) else (),
  )
