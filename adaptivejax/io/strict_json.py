# SPDX-License-Identifier: Apache-2.0
"""JSON from strangers: one meaning or a ValueError."""

import json
import math
from collections.abc import Iterable
from typing import Any


def parse_object(text: bytes, where: str) -> dict[str, Any]:
  """The object that `text` is.

  Args:
    text: UTF-8.
    where: whose text this is, for errors.

  Raises:
    ValueError: not JSON, not an object, a key twice, NaN or infinity.
  """
  try:
    value = json.loads(
      text.decode("utf-8"),
      object_pairs_hook=_object,
      parse_constant=_refuse,
      parse_float=_finite,
    )
  except RecursionError:
    raise ValueError(f"{where} nests too deeply to be meant.") from None
  except ValueError as error:  # of json, of unicode, and our own
    raise ValueError(f"{where} is not the JSON it should be: {error}") from None
  if not isinstance(value, dict):
    raise ValueError(
      f"{where} must hold a JSON object; it holds a {type(value).__name__}."
    )
  return value


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for key, value in pairs:
    if key in found:
      raise ValueError(f"the key {key!r} is there twice")
    found[key] = value
  return found


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    _refuse(text)
  return value


def _refuse(name: str):
  raise ValueError(f"{name} is no number of JSON")
