# SPDX-License-Identifier: Apache-2.0
"""Weights as decoding wants them: what one output sums over lies together.

Decoding one token reads every weight once, so it is as fast as memory.  Kernels
[I, O] of a stack, taken out by a dynamic index, are copied on CPU before they
are multiplied; as [O, I] the compiler reads them where they lie.  Prompts and
training do not care.

Axes: I features in, O features out.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

M = TypeVar("M", bound=nnx.Module)


class OutMajor(nnx.Module):
  """A linear map whose kernel is stored as [O, I]; called like the linear."""

  def __init__(self, layer: nnx.Linear):
    self.rows = nnx.Param(jnp.swapaxes(layer.kernel.get_value(), -1, -2))
    self.bias = None if layer.bias is None else layer.bias

  @property
  def kernel(self) -> nnx.Param:
    """The weights as [I, O], for who multiplies by himself."""
    return nnx.Param(jnp.swapaxes(self.rows.get_value(), -1, -2))

  def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
    y = x @ self.rows.get_value().T
    return y if self.bias is None else y + self.bias.get_value()


def out_major(model: M) -> M:
  """The model with the kernels of its linear maps stored as [O, I].

  It says the same, to rounding; itself it is unchanged.  Experts, which are
  multiplied in groups, stay as they are, and so does what is no `nnx.Linear`.
  """
  model = jax.tree.map(lambda a: a, model)  # a copy
  for path, part in list(nnx.iter_modules(model)):
    if "experts" in path:
      continue
    for name, value in list(vars(part).items()):
      if type(value) is nnx.Linear and name != "experts":
        setattr(part, name, OutMajor(value))
  return model
