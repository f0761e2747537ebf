# SPDX-License-Identifier: Apache-2.0
"""A report on disk: `report.json`, and `report.html` rendered from the same."""

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

from adaptivejax.files import write_atomically
from adaptivejax.report import data
from adaptivejax.report.page import page

FORMAT = 1
DERIVED = ("slower", "quality_loss")


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
    record = json.loads(path.read_text(encoding="utf-8"))
    found = record.pop("format", None)
    if found != FORMAT:
      raise ValueError(f"format {found!r}, but this version reads {FORMAT}")
    for point in record["points"]:
      for name in DERIVED:
        point.pop(name, None)
    return _typed(data.Report, record)
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ValueError(
      f"{path} is not a report of adaptivejax: {error}"
    ) from error


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


def _typed(kind: Any, x: Any) -> Any:
  """`x` from JSON as the annotated type `kind`."""
  if x is None:
    return None
  if dataclasses.is_dataclass(kind):
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(x) - set(hints))
    if unknown:
      raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}")
    return kind(
      **{name: _typed(hints[name], value) for name, value in x.items()}
    )
  if kind is bytes:
    return x.encode("latin-1")
  if isinstance(kind, types.UnionType):  # a value or None
    return _typed(typing.get_args(kind)[0], x)
  if typing.get_origin(kind) is tuple:
    item = typing.get_args(kind)[0]
    return tuple(_typed(item, value) for value in x)
  return x
