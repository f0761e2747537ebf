# SPDX-License-Identifier: Apache-2.0
"""A report on disk: `report.json`, and `report.html` rendered from the same."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from adaptivejax.files import write_atomically
from adaptivejax.report import data
from adaptivejax.report.page import page
from adaptivejax.report.typed import typed
from adaptivejax.untrusted import read_object

FORMAT = 1
DERIVED = ("slower", "quality_loss")
LONGEST = 50_000_000
"""Bytes of a `report.json` at most."""
POINTS = 2000
"""Points of a report at most: each is a mark of its own in a plot."""


def write_report(report: data.Report, folder: Path) -> Path:
  """Writes `report.json` and `report.html` into `folder`; the HTML's path.

  Both are complete before either takes the place of an older one.
  """
  folder.mkdir(parents=True, exist_ok=True)
  html = folder / "report.html"
  json_file = folder / "report.json"
  write_atomically({json_file: to_json(report), html: page(report)})
  return html


def to_json(report: data.Report) -> str:
  """The report as JSON: NaN is null, bytes are text of code points 0..255."""
  record = _plain(report)
  for entry, point in zip(record["points"], report.points):
    entry["slower"] = point.slower
    entry["quality_loss"] = _plain(report.loss_of_quality(point))
  return json.dumps({"format": FORMAT} | record, allow_nan=False) + "\n"


def load_report(folder: Path) -> data.Report:
  """Reads `report.json` of a folder."""
  path = folder / "report.json"
  if not path.is_file():
    raise ValueError(f"{path} does not exist: is {folder} the folder of a run?")
  try:
    record = read_object(path, LONGEST)
    found = record.pop("format", None)
    if found != FORMAT:
      raise ValueError(f"format {found!r}, but this version reads {FORMAT}")
    points = record.get("points")
    for point in points if isinstance(points, list) else []:
      for name in DERIVED if isinstance(point, dict) else ():
        point.pop(name, None)
    report = typed(data.Report, record, "the report")
    if len(report.points) > POINTS:
      raise ValueError(f"{len(report.points)} points; at most {POINTS}")
  except ValueError as error:
    raise ValueError(
      f"{path} is not a report of adaptivejax: {error}. Measure again, or take"
      " the file of another run."
    ) from error
  return report


def _plain(x: Any) -> Any:
  if dataclasses.is_dataclass(x):
    names = [field.name for field in dataclasses.fields(x)]
    return {name: _plain(getattr(x, name)) for name in names}
  if isinstance(x, dict):
    return {key: _plain(value) for key, value in x.items()}
  if isinstance(x, (list, tuple)):
    return [_plain(value) for value in x]
  if isinstance(x, bytes):
    return x.decode("latin-1")
  return None if isinstance(x, float) and not math.isfinite(x) else x
