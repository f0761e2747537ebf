# SPDX-License-Identifier: Apache-2.0
"""What a kernel makes inside `jax.shard_map`: over which axes it differs."""

from collections.abc import Sequence
from typing import Any

import jax


def result(
  shape: Sequence[int], dtype: Any, *operands: jax.Array
) -> jax.ShapeDtypeStruct:
  """The type of what is made of the operands: it varies over all their axes.

  `pallas_call` must be told, for it does not look at what its kernel does.
  """
  axes: frozenset[str] = frozenset()
  for a in operands:
    manual = getattr(jax.typeof(a), "manual_axis_type", None)
    axes |= frozenset(getattr(manual, "varying", ()))
  if not axes:
    return jax.ShapeDtypeStruct(shape, dtype)
  varying = jax.sharding.ManualAxisType(varying=axes)
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
