# SPDX-License-Identifier: Apache-2.0
"""A config of which every field is used, ignored for a reason, or refused."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

REQUIRED: Any = object()
"""The default of what has none."""


class Fields:
  """The fields of a config, checked off as they are read.

  Args:
    values: by name.
    where: whose fields, for errors.
    limit: no size is larger: the longest axis of any tensor there is, so that
      nothing absurd is ever laid out.
    repeats: nor is there more of what has tensors of its own: how many there
      are.
  """

  def __init__(
    self, values: Mapping[str, Any], where: str, limit: int, repeats: int
  ):
    self.values = dict(values)
    self.where = where
    self.limit = limit
    self.repeats = repeats
    self.unread = set(values)

  def __contains__(self, name: str) -> bool:
    return name in self.values

  def get(self, name: str, default: Any = REQUIRED) -> Any:
    """A field as it is, read; its `default` where it is not there."""
    self.unread.discard(name)
    if name not in self.values and default is REQUIRED:
      raise ValueError(f"{self.where} does not say `{name}`.")
    return self.values.get(name, default)

  def size(self, name: str, default: Any = REQUIRED) -> Any:
    """A number of things, from 1 to `limit`; `default` where it is null."""
    why = ", the longest axis of any tensor there is"
    return self._count(name, default, self.limit, why)

  def layers(self, name: str) -> int:
    """How many times something with tensors of its own is repeated."""
    why = ", as many as there are tensors"
    return self._count(name, REQUIRED, self.repeats, why)

  def count(self, name: str, default: Any = REQUIRED) -> Any:
    """A number of things, from 1 on; `default` where it is null."""
    return self._count(name, default, 2**31 - 1)

  def number(self, name: str, default: Any = REQUIRED) -> float:
    """A positive number."""
    value = self.get(name, default)
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not 0 < value < 1e30 or not math.isfinite(value):
      raise self.refused(name, "must be a positive number")
    return float(value)

  def flag(self, name: str, default: Any = REQUIRED) -> bool:
    """True or false; null is false."""
    value = self.get(name, default)
    if value not in (True, False, None) or type(value) in (int, float):
      raise self.refused(name, "must be true or false")
    return bool(value)

  def one_of(self, name: str, values: Iterable[Any], default: Any = REQUIRED):
    """A value of which only some are supported."""
    value, values = self.get(name, default), list(values)
    if not any(value == v and type(value) is type(v) for v in values):
      shown = ", ".join(map(repr, values))
      raise self.refused(name, f"is not supported; only {shown}")
    return value

  def inner(self, name: str) -> "Fields | None":
    """The fields of an object in a field; None where it is null."""
    value = self.get(name, None)
    if value is None:
      return None
    if not isinstance(value, dict):
      raise self.refused(name, "must be an object")
    return Fields(value, f"`{name}` of {self.where}", self.limit, self.repeats)

  def ignore(self, reasons: Mapping[str, str]) -> None:
    """Reads fields of no consequence here; `reasons` says why."""
    self.unread -= set(reasons)

  def done(self) -> None:
    """Raises ValueError for fields that nobody read."""
    if self.unread:
      said = ", ".join(f"{n}={self.values[n]!r}" for n in sorted(self.unread))
      raise ValueError(
        f"{self.where} says {said}, which this loader does not know: what such"
        " a model computes would be a guess."
      )

  def refused(self, name: str, why: str) -> ValueError:
    """The error for a field, to be raised."""
    value = self.values.get(name)
    return ValueError(f"{self.where}: {name}={value!r} {why}.")

  def _count(self, name, default, most, why=""):
    value = self.get(name, default)
    if value is None and default is not REQUIRED:
      return default
    if type(value) is not int or not 1 <= value <= most:
      raise self.refused(name, f"must be a whole number in 1..{most}{why}")
    return value
