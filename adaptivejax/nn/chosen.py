# SPDX-License-Identifier: Apache-2.0
"""Training on the best k tokens of each sequence, in a chunk of static size.

Axes: B batch, T tokens, K tokens kept, D features.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.cost import flops
from adaptivejax.core.select import compact
from adaptivejax.nn.block import LayerOutput


def check_whole(cache, live) -> None:
  """Raises ValueError where top-k would not see whole sequences."""
  if cache is not None or live is not None:
    raise ValueError(
      "top-k over a sequence is not causal: training takes whole sequences,"
      " without a cache or a `live` mask. Leave `key` out to generate."
    )


def on_chosen(
  layer: Callable[[Array, Array], LayerOutput],
  gate: Callable[[Array], Array],
  x: Float[Array, "B T D"],
  positions: Int[Array, "B T"],
  chosen: Bool[Array, "B T"],
  k: int,
) -> LayerOutput:
  """Adds gate(x) * (layer(x) - x) to the chosen tokens; the others pass.

  Args:
    layer: `(x f[B, K, D], positions i32[B, K]) -> LayerOutput`.
    gate: `x f[B, K, D] -> f[B, K, 1]`.
    x, positions: of all tokens.
    chosen: k tokens of each sequence.
    k: how many (static).

  Returns:
    As `layer`; the cost is compared with that of all tokens.
  """
  order = jax.vmap(lambda m: compact(m)[0][:k])(chosen)  # ascending: causal
  rows = jnp.arange(x.shape[0])[:, None]
  some, place = x[rows, order], positions[rows, order]
  y, cache, cost, signals = layer(some, place)
  full = flops(lambda x: layer(x, positions)[0], x)
  cost = cost._replace(full=jnp.full_like(cost.full, full))
  return x.at[rows, order].add(gate(some) * (y - some)), cache, cost, signals
