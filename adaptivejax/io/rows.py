# SPDX-License-Identifier: Apache-2.0
"""Where each tensor of a file belongs in a model, as a table.

A leaf of a model may be made of many tensors: layers, and experts in them, are
stacked in front, and keys and values lie side by side along the last axis.  A
`Row` says it for one kind of tensor; read from left to right it loads, from
right to left it saves.

    Row("model.layers.{layer}.self_attn.k_proj.weight",
        "layers.attention.key_value.kernel", axes=MATRIX, part=(0, 2))

Axes: L layers, E experts, I features in, O features out.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from flax import nnx

MATRIX = (1, 0)
"""`axes` of a linear map: the file has [O, I], the model [I, O]."""

WHOLE = (0, 1)


class Row(NamedTuple):
  """One kind of tensor.

  Attributes:
    tensor: its name, with `{layer}` and `{expert}` where there are several,
      which lead the leaf's axes in this order.
    leaf: path of the parameter in the model.
    axes: order of the tensor's last axes in the model; as they are if empty.
    part: `(i, n)`, the i-th of n equal parts of the leaf's last axis.
    take: the same of the tensor, once its axes are in order.
  """

  tensor: str
  leaf: str
  axes: tuple[int, ...] = ()
  part: tuple[int, int] = WHOLE
  take: tuple[int, int] = WHOLE


class Piece(NamedTuple):
  """One tensor of a `Row`."""

  tensor: str
  row: Row
  index: tuple[int, ...]
  """Of its layer, of its expert."""


class Plan(NamedTuple):
  """What a `config.json` asks for.

  Attributes:
    make: makes the model, `make(rngs)`; for loading, only shapes are computed.
    forms: the tables of the forms that such files come in; the first is the one
      that is written, and takes whole tensors.
    counts: how many there are of `{layer}` and `{expert}`.
    copies: tensors that may be there besides, and what they must equal.
    ignored: patterns of tensors that may be there besides, and why they are not
      needed.
  """

  make: Callable[[nnx.Rngs], nnx.Module]
  forms: tuple[tuple[Row, ...], ...]
  counts: Mapping[str, int]
  copies: Mapping[str, str] = {}
  ignored: Mapping[str, str] = {}


def linear_rows(
  tensor: str,
  leaf: str,
  *,
  bias: bool = False,
  part: tuple[int, int] = WHOLE,
) -> list[Row]:
  """The rows of a linear map with that prefix."""
  rows = [Row(f"{tensor}.weight", f"{leaf}.kernel", MATRIX, part)]
  return rows + [Row(f"{tensor}.bias", f"{leaf}.bias", (), part)] * bias


def pieces(row: Row, counts: Mapping[str, int]) -> Iterator[Piece]:
  """All tensors of a row, one at a time: there may be absurdly many."""
  names = [name for name in ("layer", "expert") if f"{{{name}}}" in row.tensor]
  for index in itertools.product(*(range(counts[name]) for name in names)):
    named = dict(zip(names, index))
    yield Piece(row.tensor.format(**named), row, index)


def choose_form(
  plan: Plan, names: Collection[str], where: str
) -> tuple[Row, ...]:
  """The table that fits the tensors of a file, `where`.

  Raises:
    ValueError: a tensor is missing, or one is there that has no place.
  """
  first = lambda row: next(pieces(row, plan.counts)).tensor
  fit = lambda form: sum(first(row) in names for row in form) / len(form)
  form = max(plan.forms, key=fit)
  expected = set()
  for row in form:
    for piece in pieces(row, plan.counts):
      if piece.tensor not in names:
        raise ValueError(
          f"{where}: tensor {piece.tensor!r} is missing; there are"
          f" {_some(names)}."
        )
      expected.add(piece.tensor)
  extra = [
    name
    for name in names
    if name not in expected
    and name not in plan.copies
    and not any(re.fullmatch(pattern, name) for pattern in plan.ignored)
  ]
  if extra:
    raise ValueError(
      f"{where}: no place in the model that its config describes for tensor"
      f" {_some(extra)}."
    )
  return form


def tensor_shape(row: Row, leaf: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that a tensor must have for a leaf of such shape."""
  lead = row.tensor.count("{layer}") + row.tensor.count("{expert}")
  *rest, last = leaf[lead:]
  ordered = (*rest, last // row.part[1] * row.take[1])
  back = sorted(range(len(row.axes)), key=row.axes.__getitem__)
  fixed = len(ordered) - len(row.axes)
  return (*ordered[:fixed], *(ordered[fixed + i] for i in back))


def in_order(row: Row, tensor):
  """The tensor as it lies in the model: an array, NumPy's or JAX's."""
  fixed = tensor.ndim - len(row.axes)
  axes = *range(fixed), *(fixed + i for i in row.axes)
  return tensor.transpose(axes)[..., portion(row.take, tensor.shape[axes[-1]])]


def out_of_order(row: Row, part):
  """The tensor as it lies in the file; undoes `in_order` of a whole one."""
  back = sorted(range(len(row.axes)), key=row.axes.__getitem__)
  fixed = part.ndim - len(row.axes)
  return part.transpose(*range(fixed), *(fixed + i for i in back))


def portion(part: tuple[int, int], size: int) -> slice:
  """The places of a part of an axis."""
  i, n = part
  return slice(i * (size // n), (i + 1) * (size // n))


def _some(names: Collection[str]) -> str:
  shown = ", ".join(repr(name) for name in sorted(names)[:4])
  more = len(names) - 4
  return shown + (f" and {more} more" if more > 0 else "")
