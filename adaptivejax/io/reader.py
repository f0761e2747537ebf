# SPDX-License-Identifier: Apache-2.0
"""Reads one model out of a source, checked first, then tensor by tensor."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from adaptivejax.io.header import DTYPES
from adaptivejax.io.place import Shardings, fill, paths_of, shardings_of
from adaptivejax.io.rows import (
  Plan,
  Row,
  in_order,
  pieces,
  portion,
  tensor_shape,
)
from adaptivejax.io.source import Source
from adaptivejax.nn.setting import Setting


class Reader:
  """The model that a plan makes, with the values of a source.

  Arguments are those of `load`.
  """

  def __init__(
    self,
    source: Source,
    plan: Plan,
    dtype: DTypeLike | None,
    allow_nonfinite: bool,
  ):
    self.source = source
    self.plan = plan
    self.dtype = None if dtype is None else _weights(dtype)
    self.allow_nonfinite = allow_nonfinite

  def model(self, form: tuple[Row, ...], sharding: Shardings | None) -> Any:
    """All of it; nothing is laid out before all shapes are checked."""
    empty = jax.eval_shape(lambda: self.plan.make(nnx.Rngs(0)))
    rows: dict[str, list[Row]] = {}
    for row in form:
      rows.setdefault(row.leaf, []).append(row)
    params = paths_of(nnx.state(empty, nnx.Param))
    assert set(params) == set(rows), set(params) ^ set(rows)
    leaves = {
      path: jax.ShapeDtypeStruct(
        leaf.shape, self._check(leaf.shape, rows[path])
      )
      for path, leaf in params.items()
    }
    places = shardings_of(leaves, sharding)
    self._check_copies()
    found = {
      path: fill(leaf, places[path], self._blocks(leaf, rows[path]))
      for path, leaf in leaves.items()
    }
    settings = paths_of(nnx.state(empty, Setting))  # 0: as it was trained
    found |= {p: jnp.zeros(s.shape, s.dtype) for p, s in settings.items()}
    treedef = jax.tree.structure(empty)
    return jax.tree.unflatten(
      treedef, [found[path] for path in paths_of(empty)]
    )

  def _check(self, leaf: tuple[int, ...], rows: list[Row]) -> np.dtype:
    """The type of a leaf, once its tensors have the shapes they must have."""
    types: dict[np.dtype, str] = {}
    for row in rows:
      wanted = tensor_shape(row, leaf)
      for piece in pieces(row, self.plan.counts):
        spec = self.source.specs[piece.tensor]
        if spec.dtype not in DTYPES.values():
          raise ValueError(
            f"{self.source.where}: tensor {piece.tensor!r} is of dtype 'I64';"
            f" weights are one of {[*DTYPES]}."
          )
        types[spec.dtype] = piece.tensor
        if spec.shape != wanted:
          raise ValueError(
            f"{self.source.where}: tensor {piece.tensor!r} has shape"
            f" {spec.shape}; its config asks for {wanted}."
          )
    if self.dtype is not None:
      return self.dtype
    if len(types) > 1:
      said = ", ".join(f"{name!r} is {t}" for t, name in types.items())
      raise ValueError(
        f"{self.source.where}: {said}: give a `dtype` for them to agree."
      )
    return next(iter(types))

  def _check_copies(self) -> None:
    for name, other in self.plan.copies.items():
      if name in self.source.specs:
        a, b = self.source.read(name), self.source.read(other)
        if a.tobytes() != b.tobytes():
          raise ValueError(
            f"{self.source.where}: tensor {name!r} should equal {other!r},"
            " which its config ties it to."
          )

  def _blocks(
    self, leaf: jax.ShapeDtypeStruct, rows: list[Row]
  ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """What a leaf is made of, and where it goes."""
    for row in rows:
      last = portion(row.part, leaf.shape[-1]).start
      for piece in pieces(row, self.plan.counts):
        block = in_order(row, self.source.read(piece.tensor))
        self._check_values(piece.tensor, block, leaf.dtype)
        middle = block.ndim - 1
        start = (*piece.index, *[0] * middle, last)
        yield start, block[(None,) * len(piece.index)]

  def _check_values(self, name: str, block: np.ndarray, dtype) -> None:
    if self.allow_nonfinite:
      return
    with np.errstate(invalid="ignore"):  # of a NaN that is to signal
      finite = np.isfinite(block).all()
    if not finite:
      raise ValueError(
        f"{self.source.where}: tensor {name!r} holds NaN or infinity; pass"
        " `allow_nonfinite=True` if this is meant."
      )
    if dtype == np.float16 and block.dtype != dtype:
      most = float(np.abs(block).max(initial=0))
      if most > float(np.finfo(np.float16).max):
        raise ValueError(
          f"{self.source.where}: tensor {name!r} reaches {most:g}, out of range"
          " of float16: take bfloat16 or float32."
        )


def _weights(dtype: DTypeLike) -> np.dtype:
  """A type that weights may have."""
  try:
    known = np.dtype(dtype)
  except TypeError:
    known = None
  if known is None or known not in DTYPES.values():
    raise ValueError(f"weights are one of {[*DTYPES]}; got {dtype=}.")
  return known
