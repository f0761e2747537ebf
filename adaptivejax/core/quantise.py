# SPDX-License-Identifier: Apache-2.0
"""Keys and values in eight bits, with a scale per token and head.

Axes: N keys, tokens by heads, say; D head width.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LARGEST = 127
"""Codes are symmetric, -127..127: 0 is exact."""


def quantise(
  x: Float[Array, "*N D"],
) -> tuple[Int[Array, "*N D"], Float[Array, "*N"]]:
  """`(codes i8, scale f32)`: x is about `codes * scale`.

  The largest of D is exact up to rounding, and no error is above scale / 2; a
  vector of zeros has scale 0.  One that is not finite has a scale that is not.
  """
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(-1) / LARGEST
  unit = jnp.where(scale > 0, scale, 1)[..., None]
  codes = jnp.round(x / unit)
  return jnp.where(jnp.isfinite(codes), codes, 0).astype(jnp.int8), scale


def dequantise(
  codes: Int[Array, "*N D"], scale: Float[Array, "*N"]
) -> Float[Array, "*N D"]:
  """The numbers, f32; inverse of `quantise` but for rounding."""
  return codes.astype(jnp.float32) * scale[..., None]
