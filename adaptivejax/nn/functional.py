# SPDX-License-Identifier: Apache-2.0
"""A module as a pure function and its parameters."""

from collections.abc import Callable
from typing import Any

from flax import nnx


def functional(module: nnx.Module) -> tuple[Callable[..., Any], nnx.State]:
  """Splits a module into `(apply, params)`.

  `apply(params, *args, **kwargs)` calls the module on other parameters of the
  same structure; `params` is a pytree for optax, orbax and `jax.grad`.
  """
  graph, params, rest = nnx.split(module, nnx.Param, ...)

  def apply(params, *args, **kwargs):
    return nnx.merge(graph, params, rest)(*args, **kwargs)

  return apply, params
