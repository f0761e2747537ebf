# SPDX-License-Identifier: Apache-2.0
"""Experts that compute nothing, or next to nothing: zero, copy and constant.

Axes: D features, Z experts, S constant experts.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class ZeroComputationExperts(nnx.Module):
  """All of them, elementwise on every item.

      zero(x) = 0,   copy(x) = x,   constant(x) = a_1 x + a_2 v,
      [a_1, a_2] = softmax(W_c x)

  Jin et al., 2024 (eqs. 3-5), https://arxiv.org/abs/2410.07348

  Args:
    features: D.
    kinds: experts that are zero, copy and constant (static), in this order.
    rngs: for the constants v and W_c.
  """

  def __init__(
    self, features: int, kinds: tuple[int, int, int], *, rngs: nnx.Rngs
  ):
    if min(kinds) < 0:
      raise ValueError(
        f"{kinds=} must count the zero, the copy and the constant experts."
      )
    draw = lambda *shape: jax.random.normal(rngs.params(), shape)
    self.mix = nnx.Param(draw(kinds[2], features, 2) * features**-0.5)
    self.constant = nnx.Param(draw(kinds[2], features))
    self.kinds = kinds
    self.count = sum(kinds)

  def __call__(
    self, x: Float[Array, "*N D"], weights: Float[Array, "*N Z"]
  ) -> Float[Array, "*N D"]:
    """The weighted sum over the experts; a weight of 0 is no choice."""
    zero, copy, _ = self.kinds
    keep = weights[..., zero : zero + copy].sum(-1)
    split = jnp.einsum("...d,sdj->...sj", x, self.mix.get_value())
    split = jax.nn.softmax(split.astype(jnp.float32))
    keep_some, replace = jnp.moveaxis(
      split * weights[..., zero + copy :, None], -1, 0
    )
    y = (keep + keep_some.sum(-1))[..., None] * x
    return (y + replace @ self.constant.get_value()).astype(x.dtype)
