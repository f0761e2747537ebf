# SPDX-License-Identifier: Apache-2.0
"""The linear map every module here is made of.

Axes: I features in, O features out.
"""

import jax
from flax import nnx


def linear(
  features_in: int, features_out: int, *, rngs: nnx.Rngs, bias: bool = False
) -> nnx.Linear:
  """`x @ kernel`, kernel [I, O] of variance 1 / I."""
  if min(features_in, features_out) < 1:
    raise ValueError(
      f"a layer needs at least one feature on each side; got {features_in=} and"
      f" {features_out=}."
    )
  init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
  return nnx.Linear(
    features_in, features_out, use_bias=bias, kernel_init=init, rngs=rngs
  )
