# SPDX-License-Identifier: Apache-2.0
"""The scorer behind a decision.

Axes: D features, M choices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adaptivejax.nn.linear import linear


class Router(nnx.Module):
  """Scores `choices` per item, linearly or through one hidden layer.

  Args:
    features, choices: D and M (static).
    hidden: width of the hidden layer; none if not given (static).
    norm: makes a norm of what it reads, from D; none if not given.  States
      between layers of a trained model have single features in the thousands.
    rngs: for the parameters.
  """

  def __init__(
    self,
    features: int,
    choices: int = 1,
    *,
    hidden: int | None = None,
    norm: Callable[[int], nnx.Module] | None = None,
    rngs: nnx.Rngs,
  ):
    if min(features, choices) < 1 or (hidden is not None and hidden < 1):
      raise ValueError(
        f"a router needs at least one of each: {features=}, {choices=},"
        f" {hidden=}."
      )
    self.norm = None if norm is None else norm(features)
    self.inner = (
      linear(features, hidden, rngs=rngs, bias=True) if hidden else None
    )
    self.outer = linear(hidden or features, choices, rngs=rngs, bias=True)

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... M"]:
    if self.norm is not None:
      x = self.norm(x)
    if self.inner is not None:
      x = jax.nn.gelu(self.inner(x))
    return self.outer(x)

  def choose(
    self, x: Float[Array, "... D"], tax: Float[Array, " M"]
  ) -> Int[Array, "..."]:
    """The choice of the highest score less its `tax` (dynamic), in f32."""
    return (self(x).astype(jnp.float32) - tax).argmax(-1).astype(jnp.int32)
