# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: who owns it, and what was measured on the way.

runs/NAME/run.json        the plain fields of its config, by dotted name
runs/NAME/config.py       the config file, when the run came from one
runs/NAME/metrics.jsonl   {"step", "split": "train" | "validation",
                           "seconds": since the start, metric: number ...}
runs/NAME/checkpoints/    the newest checkpoints (`training.checkpoint`)
runs/NAME/profile/        a window of steps, if asked for (`training.profile`)
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def claim(out: Path) -> None:
  """Makes the folder; refuses one that holds something other than a run."""
  if out.exists() and not out.is_dir():
    raise ValueError(f"{out} is a file: give the run another name")
  record = out / "run.json"
  if out.is_dir() and any(out.iterdir()) and not record.exists():
    raise ValueError(
      f"{out} holds something else than a run: give the run another name"
    )
  out.mkdir(parents=True, exist_ok=True)
  record.touch()


def content(out: Path) -> list[str]:
  """What is in the folder of a run, and which checkpoints."""
  found = (*out.glob("*"), *out.glob("checkpoints/*"))
  return sorted(path.relative_to(out).as_posix() for path in found)


def describe(out: Path, fields: Mapping[str, Any], source: Path | None) -> None:
  """Writes the plain fields of the config, and a copy of its file, `source`."""
  (out / "run.json").write_text(json.dumps(fields, indent=2) + "\n")
  copy = out / "config.py"
  if source is not None and source.resolve() != copy.resolve():
    shutil.copyfile(source, copy)


class MetricsLog:
  """Appends to metrics.jsonl.

  Opened at `step`, it drops the lines of later steps, which a run that was
  killed after its newest checkpoint leaves behind and is about to repeat.  With
  `write` false it only remembers.
  """

  def __init__(self, out: Path, step: int, *, write: bool = True):
    self.path = out / "metrics.jsonl" if write else None
    self.lines = [line for line in read_metrics(out) if line["step"] <= step]
    if self.path is None:
      return
    draft = self.path.with_suffix(".draft")
    draft.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
    draft.replace(self.path)

  @property
  def seconds(self) -> float:
    """Time of the newest line, since the start of the run."""
    return self.lines[-1]["seconds"] if self.lines else 0.0

  @property
  def latest(self) -> dict[str, float]:
    """The newest value of each metric of each split, by `split/metric`."""
    return {
      f"{line['split']}/{name}": value
      for line in self.lines
      for name, value in line.items()
      if name not in ("step", "split", "seconds")
    }

  def write(
    self, step: int, split: str, seconds: float, metrics: Mapping[str, float]
  ) -> None:
    """Adds a line."""
    line = {"step": step, "split": split, "seconds": round(seconds, 3)}
    self.lines.append(line | dict(metrics))
    if self.path is None:
      return
    with self.path.open("a") as file:
      file.write(json.dumps(self.lines[-1]) + "\n")


def read_metrics(out: Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl; a last line cut short by a crash is dropped."""
  path = out / "metrics.jsonl"
  if not path.exists():
    return []
  return [
    json.loads(line)
    for line in path.read_text().splitlines(keepends=True)
    if line.endswith("\n")
  ]
