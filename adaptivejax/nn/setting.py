# SPDX-License-Identifier: Apache-2.0
"""Numbers of a module that are data but not trained: its budget.

A method that decides inside the model has one `Setting`; raising it makes the
model cheaper.  As data it is free to change: nothing compiles again.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

M = TypeVar("M", bound=nnx.Module)


class Setting(nnx.Variable):
  """A scalar per layer; 0 is how the module was trained, more is cheaper."""


class Frozen(nnx.Variable):
  """A weight that is not trained, such as a teacher's."""


def frozen(module: M) -> M:
  """A copy of which no weight is trained."""
  module = jax.tree.map(jnp.copy, module)
  for _, part in nnx.iter_modules(module):
    for name, value in list(vars(part).items()):
      if isinstance(value, nnx.Param):
        setattr(part, name, Frozen(value.get_value()))
  return module


def adjust(model: M, value: Float[Array, ""] | float) -> M:
  """The model with every `Setting` at `value` (dynamic); itself unchanged."""
  graph, settings, rest = nnx.split(model, Setting, ...)
  if not jax.tree.leaves(settings):
    raise ValueError(
      f"{type(model).__name__} holds no `Setting`: nothing in it decides by a"
      " budget. Depth policies take theirs as an argument."
    )
  changed = jax.tree.map(lambda a: jnp.full_like(a, value), settings)
  return nnx.merge(graph, changed, rest)


def refuse_nan(**settings) -> None:
  """Raises ValueError for a setting that holds NaN, unless it is traced.

  No comparison with NaN is true: it would silently mean never.
  """
  for name, value in settings.items():
    for leaf in jax.tree.leaves(value):
      if not isinstance(leaf, jax.core.Tracer) and _holds_nan(leaf):
        raise ValueError(
          f"`{name}` is NaN, which compares with nothing: give a number; one"
          " out of range, such as 2, means never."
        )


def refuse_outside(low: int, high: int, what: str, **settings) -> None:
  """Raises ValueError for a setting outside `low`..`high`, unless traced.

  `what` says what there is of so many, as in "the layers there are".
  """
  for name, value in settings.items():
    if isinstance(value, jax.core.Tracer):
      continue
    known = np.asarray(value)
    if not ((low <= known) & (known <= high)).all():
      raise ValueError(f"{name}={known} must lie in {low}..{high}, {what}.")


def _holds_nan(leaf) -> bool:
  number = isinstance(leaf, float | np.generic | np.ndarray | jax.Array)
  floating = number and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
  return floating and bool(np.isnan(np.asarray(leaf)).any())  # never traced
