# SPDX-License-Identifier: Apache-2.0
"""Row-wise functions as jaxprs, closed over nothing that carries a gradient.

`bucketed` runs one function at several static row counts, inside loops, under
a custom gradient.  There a traced array that the function closes over would be
lost; `trace_rows` makes it an explicit operand, once for all row counts.

Axes: N items, C rows of one chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from adaptivejax.core.cost import subjaxprs
from adaptivejax.core.varying import varying_axes

Leaves = list[Any]

COLLECTIVES = {"psum", "psum2", "psum_invariant", "pmax", "pmin", "ppermute"}
COLLECTIVES |= {"all_gather", "all_gather_invariant", "all_to_all"}
COLLECTIVES |= {"reduce_scatter", "psum_scatter", "ragged_all_to_all"}


class RowFunction(NamedTuple):
  """A row-wise `f` traced at each static size.

  Attributes:
    jaxprs: one jaxpr per size.
    constants: per size, what it closes over: arrays, or places in `theta`.
    operands: how many leaves of `theta` are operands; the rest was closed over.
    out_tree: structure of the output rows.
    out_avals: shapes, dtypes and varying axes of the output rows (any size).
  """

  jaxprs: dict[int, jex.Jaxpr]
  constants: dict[int, list[Any]]
  operands: int
  out_tree: Any
  out_avals: list[Any]

  @property
  def out_axes(self) -> frozenset[str]:
    """Mesh axes over which any output differs."""
    return varying_axes(self.out_avals)

  def apply(self, rows: Leaves, theta: Leaves) -> Leaves:
    """`f` on C rows, C a traced size or a multiple of one."""
    size = rows[0].shape[0]
    if size not in self.jaxprs:
      part = max(s for s in self.jaxprs if size % s == 0)
      split = [a.reshape(size // part, part, *a.shape[1:]) for a in rows]
      out = jax.vmap(self.apply, (0, None))(split, theta)
      return [a.reshape(size, *a.shape[2:]) for a in out]
    constants = [
      theta[c.place] if isinstance(c, _Closed) else c
      for c in self.constants[size]
    ]
    operands = theta[: self.operands]
    return jax.core.eval_jaxpr(self.jaxprs[size], constants, *rows, *operands)


class _Closed(NamedTuple):
  """A traced array that `f` closes over, by its place in `theta`."""

  place: int


def trace_rows(
  f: Callable[..., Any],
  x: Any,
  operands: Any,
  sizes: tuple[int, ...],
  predicate: frozenset[str],
) -> tuple[RowFunction, Leaves]:
  """Traces `f(rows, *operands)` at every size.

  Args:
    f: the row-wise function.
    x: pytree of all N rows; only shapes, dtypes and varying axes are read.
    operands: tuple of pytrees.
    sizes: row counts to trace (static).
    predicate: mesh axes over which the caller's decision differs.

  Returns:
    The function and `theta`: operand leaves, then what `f` closes over.

  Raises:
    ValueError: `f` does not map C rows to C rows, or closes over an array that
      is replicated over `predicate`, or holds a collective over it.
  """
  theta = jax.tree.leaves(operands)
  count, seen = len(theta), {}
  jaxprs, constants, avals, out = {}, {}, [], None
  for size in sizes:
    rows = jax.tree.map(functools.partial(_example, size=size), x)
    closed, out = jax.make_jaxpr(f, return_shape=True)(rows, *operands)
    avals = closed.out_avals
    _check_rows(avals, size)
    _check_collectives(closed.jaxpr, predicate)
    jaxprs[size], constants[size] = closed.jaxpr, []
    for const in closed.consts:
      if isinstance(const, jax.core.Tracer):
        _check_closed(const, predicate)
        if id(const) not in seen:
          seen[id(const)] = len(theta)
          theta.append(const)
        const = _Closed(seen[id(const)])
      constants[size].append(const)
  tree = jax.tree.structure(out)
  return RowFunction(jaxprs, constants, count, tree, avals), theta


def differentiable(leaves: Leaves) -> Leaves:
  """The leaves that carry a gradient."""
  return [a for a in leaves if _inexact(a)]


def merge(values: Leaves, leaves: Leaves) -> Leaves:
  """`leaves` with the differentiable ones replaced by `values`."""
  fresh = iter(values)
  return [next(fresh) if _inexact(a) else a for a in leaves]


def with_none(values: Leaves, leaves: Leaves) -> list[Any]:
  """Cotangents for all `leaves`: None for those that carry no gradient."""
  fresh = iter(values)
  return [next(fresh) if _inexact(a) else None for a in leaves]


def _inexact(a: Any) -> bool:
  return jnp.issubdtype(a.dtype, jnp.inexact)


def _example(a: Any, size: int) -> jax.Array:
  return jnp.broadcast_to(a[:1], (size, *a.shape[1:]))


def _check_rows(avals: list[Any], size: int) -> None:
  for a in avals:
    if not a.shape or a.shape[0] != size:
      raise ValueError(
        f"`f` must return one row per row: given {size} rows it returned shape"
        f" {a.shape}."
      )
    if not _inexact(a):
      raise ValueError(
        f"`f` must return floating-point rows; got {a.dtype}. Compute integers"
        " outside, on all items."
      )


def _check_collectives(jaxpr: jex.Jaxpr, predicate: frozenset[str]) -> None:
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in COLLECTIVES:
      axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
      axes = {axes} if isinstance(axes, str) else set(axes)
      if axes & predicate:
        raise ValueError(
          f"`f` holds a `{eqn.primitive.name}` over {sorted(axes)}, mesh axes"
          " on which the selection differs: devices would wait for each other"
          " for ever. Do it outside `bucketed`."
        )
    for sub in subjaxprs(eqn.params):
      _check_collectives(sub, predicate)


def _check_closed(const: Any, predicate: frozenset[str]) -> None:
  missing = predicate - varying_axes(const)
  if missing and _inexact(const):
    raise ValueError(
      f"`f` closes over an array of shape {const.shape} that is replicated over"
      f" mesh axes {sorted(missing)} on which the selection differs. Its"
      " gradient would deadlock: pass it to `bucketed` as an operand."
    )
