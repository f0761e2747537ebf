# SPDX-License-Identifier: Apache-2.0
"""Kernels inside `jax.shard_map`: over which mesh axes arrays differ."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax


def axes_of(tree: Any) -> frozenset[str]:
  """The mesh axes over which any array of `tree` differs."""
  types = (jax.typeof(a) for a in jax.tree.leaves(tree))
  manual = (getattr(t, "manual_axis_type", None) for t in types)
  return frozenset().union(*(getattr(m, "varying", None) or () for m in manual))


def alike(tree: Any) -> Any:
  """All arrays differ over the axes over which one of them does.

  So the sums over devices, where an array was the same on all, come outside of
  what has a derivative of its own.
  """
  every = axes_of(tree)

  def mark(a):
    missing = tuple(sorted(every - axes_of(a)))
    return lax.pcast(a, missing, to="varying") if missing else a

  return jax.tree.map(mark, tree)


def result(
  shape: Sequence[int], dtype: Any, *operands: jax.Array
) -> jax.ShapeDtypeStruct:
  """The type of what is made of the operands: it differs where they do.

  `pallas_call` must be told, for it does not look at what its kernel does.
  """
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return jax.ShapeDtypeStruct(shape, dtype)
  varying = jax.sharding.ManualAxisType(varying=axes_of(operands))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
