# SPDX-License-Identifier: Apache-2.0
"""What the routers of mixtures of experts share.

Axes: T tokens, D features, E experts, K choices per item.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.dispatch import NOBODY, within_capacity


def router_logits(
  gate: nnx.Module, x: Float[Array, "*N D"]
) -> Float[Array, "*N E"]:
  """The scores of `gate`, in f32 whatever `x` is (Fedus et al., 2021, 2.4).

  Raises:
    ValueError: one of them is NaN, unless traced.  No comparison with NaN is
      true: the choice would be a silent accident.
  """
  logits = gate(x.astype(jnp.float32))
  traced = isinstance(logits, jax.core.Tracer)
  if not traced and np.isnan(np.asarray(logits)).any():
    raise ValueError(
      "the router's logits hold NaN: look for it in the input or in the"
      " router's parameters. Items that are not `live` may hold anything."
    )
  return logits


def only_live(
  experts: Int[Array, "*N K"], live: Bool[Array, "*N"] | None
) -> Int[Array, "*N K"]:
  """No choice where an item is not live."""
  return (
    experts if live is None else jnp.where(live[..., None], experts, NOBODY)
  )


def fewer_choices(
  experts: Int[Array, "*N K"], fewer: Float[Array, ""]
) -> Int[Array, "*N K"]:
  """The first K - `fewer` choices (dynamic; at most K)."""
  k = experts.shape[-1]
  return jnp.where(jnp.arange(k) < k - fewer, experts, NOBODY)


def weights_of(
  scores: Float[Array, "*N E"], experts: Int[Array, "*N K"]
) -> Float[Array, "*N K"]:
  """The scores of the choices, 0 for no choice."""
  there = experts >= 0
  picked = jnp.take_along_axis(scores, jnp.where(there, experts, 0), axis=-1)
  return jnp.where(there, picked, 0)


def renormalise(weights: Float[Array, "*N K"]) -> Float[Array, "*N K"]:
  """Weights that sum to 1 over the choices of an item, if it has any."""
  total = weights.sum(-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1)


def serve(
  wanted: Int[Array, "*B T K"],
  count: int,
  capacity: Int[Array, ""] | Int[Array, " E"] | int,
) -> tuple[Int[Array, "*B T K"], Float[Array, ""]]:
  """The choices within the capacity of each expert, per sequence.

  Returns:
    `(experts, dropped)`: the choices, and how many found no room.
  """
  within = lambda e: within_capacity(e, count, capacity)
  flat = wanted.reshape(-1, *wanted.shape[-2:])
  served = jax.vmap(within)(flat).reshape(wanted.shape)
  dropped = ((wanted >= 0) & ~served).sum(dtype=jnp.float32)
  return jnp.where(served, wanted, NOBODY), dropped
