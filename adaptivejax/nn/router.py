# SPDX-License-Identifier: Apache-2.0
"""The scorer behind a decision.

Axes: D features, M choices.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adaptivejax.nn.linear import linear


class Router(nnx.Module):
  """Scores `choices` per item, linearly or through one hidden layer."""

  def __init__(
    self,
    features: int,
    choices: int = 1,
    *,
    hidden: int | None = None,
    rngs: nnx.Rngs,
  ):
    if min(features, choices) < 1 or (hidden is not None and hidden < 1):
      raise ValueError(
        f"a router needs at least one of each: {features=}, {choices=},"
        f" {hidden=}."
      )
    self.inner = (
      linear(features, hidden, rngs=rngs, bias=True) if hidden else None
    )
    self.outer = linear(hidden or features, choices, rngs=rngs, bias=True)

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... M"]:
    if self.inner is not None:
      x = jax.nn.gelu(self.inner(x))
    return self.outer(x)

  def choose(
    self, x: Float[Array, "... D"], tax: Float[Array, " M"]
  ) -> Int[Array, "..."]:
    """The choice of the highest score less its `tax` (dynamic), in f32."""
    return (self(x).astype(jnp.float32) - tax).argmax(-1).astype(jnp.int32)
