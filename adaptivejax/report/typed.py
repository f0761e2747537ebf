# SPDX-License-Identifier: Apache-2.0
"""Values of JSON as what their annotations say, or refused by name."""

import dataclasses
import types
import typing
from typing import Any

LARGEST = 1e30
"""Of a number, either way: nothing that is measured comes near, and the sums
and scales of a plot stay finite."""


def typed(kind: Any, x: Any, where: str) -> Any:
  """`x` from JSON as the annotated type `kind`.

  Args:
    kind: a dataclass, or what its fields may be: tuples, dicts of plain values,
      unions, `bytes` (text of code points 0..255), numbers, text.
    x: what `json` makes of a text.
    where: what it is, for errors.

  Raises:
    ValueError: it is something else.
  """
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (types.UnionType, typing.Union):
    return _one_of(args, x, where)
  if dataclasses.is_dataclass(kind):
    return _record(kind, x, where)
  if origin is tuple:
    return _items(args, x, where)
  if origin is dict:
    found = _expect(dict, x, where)
    return {k: typed(args[1], v, f"{where}[{k!r}]") for k, v in found.items()}
  if kind is bytes:
    text = _expect(str, x, where)
    if any(ord(char) > 255 for char in text):
      raise ValueError(f"{where} holds characters that are no bytes")
    return text.encode("latin-1")
  if kind in (int, float):
    number = (int, float) if kind is float else int
    value = _expect(number, x, where)
    if not -LARGEST <= value <= LARGEST:
      raise ValueError(f"{where} is {x!r:.40}, out of all proportion")
    return value
  return _expect(kind, x, where)


def _one_of(kinds, x, where):
  """The first of the types that fits."""
  if x is None and types.NoneType in kinds:
    return None
  kinds = [kind for kind in kinds if kind is not types.NoneType]
  for kind in kinds[:-1]:
    try:
      return typed(kind, x, where)
    except ValueError:
      continue
  return typed(kinds[-1], x, where)


def _record(kind, x, where):
  fields = {field.name: field for field in dataclasses.fields(kind)}
  given = _expect(dict, x, where)
  if unknown := sorted(set(given) - set(fields)):
    raise ValueError(f"{kind.__name__} has no field {', '.join(unknown):.80}")
  hints = typing.get_type_hints(kind)
  make = lambda name, x: typed(hints[name], x, f"`{name}` of {where}")
  made = {name: make(name, value) for name, value in given.items()}
  missing = [
    name
    for name, field in fields.items()
    if name not in given
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValueError(f"{where} does not say {', '.join(missing)}")
  return kind(**made)


def _items(kinds, x, where):
  found = _expect(list, x, where)
  if kinds[-1] is ...:
    return tuple(typed(kinds[0], item, f"an item of {where}") for item in found)
  if len(found) != len(kinds):
    raise ValueError(f"{where} has {len(found)} items, not {len(kinds)}")
  return tuple(map(typed, kinds, found, [f"an item of {where}"] * len(found)))


def _expect(kind, x, where):
  if not isinstance(x, kind) or (isinstance(x, bool) and kind is not bool):
    raise ValueError(f"{where} must not be a {type(x).__name__}")
  return x
