# SPDX-License-Identifier: Apache-2.0
"""Normalisation over features, statistics in f32.

Axes: D features.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class RMSNorm(nnx.Module):
  """Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467, eq. 4.

  Args:
    features: D.
    epsilon: added to the mean square (static).
    offset: added to the learned scale, which then is around 0, as Gemma keeps
      it (static).
  """

  def __init__(
    self, features: int, *, epsilon: float = 1e-6, offset: float = 0.0
  ):
    _check(features)
    self.scale = nnx.Param(jnp.ones(features) - offset)
    self.epsilon = epsilon
    self.offset = offset

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    wide = x.astype(jnp.float32)
    power = jnp.mean(wide**2, axis=-1, keepdims=True)
    y = wide * jax.lax.rsqrt(power + self.epsilon)
    scale = self.scale.get_value()
    if self.offset:
      return (y * (scale.astype(jnp.float32) + self.offset)).astype(x.dtype)
    return y.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nnx.Module):
  """Ba et al., 2016, https://arxiv.org/abs/1607.06450, eq. 4."""

  def __init__(self, features: int, *, epsilon: float = 1e-6):
    _check(features)
    self.scale = nnx.Param(jnp.ones(features))
    self.bias = nnx.Param(jnp.zeros(features))
    self.epsilon = epsilon

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    power = jnp.mean(wide**2, axis=-1, keepdims=True)
    y = (wide * jax.lax.rsqrt(power + self.epsilon)).astype(x.dtype)
    scale, bias = self.scale.get_value(), self.bias.get_value()
    return y * scale.astype(x.dtype) + bias.astype(x.dtype)


def _check(features: int) -> None:
  if features < 1:
    raise ValueError(f"a norm needs at least one feature; got {features=}.")
