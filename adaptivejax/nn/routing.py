# SPDX-License-Identifier: Apache-2.0
"""What the routers of mixtures of experts share, and what they return.

Axes: T tokens, D features, E experts, K choices per item.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.dispatch import NOBODY, within_capacity
from adaptivejax.core.per_device import Layout, layout_of, on_each_device


class Routing(NamedTuple):
  """What a router decided.

  Attributes:
    experts: of each item, distinct; NOBODY (-1) for no choice, i32[*N, K].
    weights: of the choices, f[*N, K].
    penalty: the rule's auxiliary loss, f32[].
    dropped: choices that were asked for and not served, f32[].
  """

  experts: Array
  weights: Array
  penalty: Array
  dropped: Array

  @classmethod
  def of(
    cls,
    scores: Float[Array, "*N E"],
    experts: Int[Array, "*N K"],
    live: Bool[Array, "*N"] | None = None,
    *,
    renormalised: bool = False,
    scale: float = 1.0,
    penalty: Float[Array, ""] | float = 0.0,
    dropped: Float[Array, ""] | float = 0.0,
  ) -> "Routing":
    """The choices of live items, weighted by `scale` times their scores.

    With `renormalised`, the scores of an item's choices sum to 1 before.
    """
    experts = only_live(experts, live)
    there = experts >= 0
    picked = _pick(scores, jnp.where(there, experts, 0))
    weights = jnp.where(there, picked, 0)
    weights = scale * (renormalise(weights) if renormalised else weights)
    return cls(experts, weights, jnp.float32(penalty), jnp.float32(dropped))


def _pick(scores, experts):
  """The scores of the choices; of each device's items under an ambient mesh.

  For the compiler would bring all scores together in the derivative.
  """
  layout = layout_of(scores.shape[:-1]) if scores.ndim > 1 else Layout()
  pick = lambda items, _: (jnp.take_along_axis(*items, axis=-1), ())
  items = scores, experts
  if layout.axes:
    return on_each_device(pick, items, (), layout)[0]
  return pick(items, ())[0]


def router_logits(
  gate: nnx.Module, x: Float[Array, "*N D"]
) -> Float[Array, "*N E"]:
  """The scores of `gate`, in f32 whatever `x` is (Fedus et al., 2021).

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


def renormalise(weights: Float[Array, "*N K"]) -> Float[Array, "*N K"]:
  """Weights that sum to 1 over the choices of an item, if it has any."""
  total = weights.sum(-1, keepdims=True)
  return weights / jnp.where(total > 0, total, 1)


def serve(
  experts: Int[Array, "*B T K"],
  live: Bool[Array, "*B T"] | None,
  count: int,
  capacity: Int[Array, ""] | Int[Array, " E"] | int,
) -> tuple[Int[Array, "*B T K"], Float[Array, ""]]:
  """The choices of live items within each expert's capacity, per sequence.

  Returns:
    `(experts, dropped)`: the choices, and how many found no room.
  """
  wanted = only_live(experts, live)
  within = lambda e: within_capacity(e, count, capacity)
  flat = wanted.reshape(-1, *wanted.shape[-2:])
  served = jax.vmap(within)(flat).reshape(wanted.shape)
  dropped = ((wanted >= 0) & ~served).sum(dtype=jnp.float32)
  return jnp.where(served, wanted, NOBODY), dropped
