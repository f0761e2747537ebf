# SPDX-License-Identifier: Apache-2.0
r"""Tutel: the capacity of the experts follows their load.

Hwang et al., 2022, https://arxiv.org/abs/2206.03382

Of T items with K choices, each expert takes at most (published code; `f` is the
capacity factor, `needed` the load of the fullest expert on any device)

    f > 0:   K floor(f ceil(T / E)),   what does not fit is dropped
    f = 0:   needed,                   nothing ever is
    f < 0:   min(needed, K floor(-f ceil(T / E)))

in whole multiples of `alignment`.  First choices come before second ones; then
earlier items before later ones, or, if prioritized, those of a larger best gate
(Riquelme et al., 2021, https://arxiv.org/abs/2106.05974).  The gates of the K
choices are made to sum to 1, before any is dropped.

Where experts and items are changes no result, only time: `nn.shard_experts`
puts experts apart ("expert"), in slices (None, width="model"), or both; else
they are whole everywhere.  `chunks` pipelines, `nn.fastest_program` chooses.

Primitive: `within_capacity`, `expert_apply_parallel`.
Departs: another layout is another program; Tutel switches at no cost.  But for
f = 0 what an item gets depends on its batch, later items included, as in the
published code: a decoder refuses it without `allow_noncausal`.  Compute
follows the load: capacity beyond it is free.  No two-dimensional all-to-all.
Axes: D features, E experts, K choices per item.
"""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.dispatch import NOBODY, no_drop_capacity, within_capacity
from adaptivejax.nn.routing import Routing, only_live
from adaptivejax.nn.setting import Setting, refuse_nan


def tutel_capacity(
  experts: Int[Array, "*N K"],
  count: int,
  factor: Float[Array, ""] | float,
  *,
  alignment: int = 1,
  axis: str | tuple[str, ...] | None = None,
) -> Int[Array, ""]:
  """The items that each of `count` experts takes.

  Args:
    experts: chosen by the items of this device; NOBODY (-1) is no choice.
    count: E (static).
    factor: f, of any sign (dynamic).
    alignment: the capacity is a multiple of it (static).
    axis: mesh axes of the devices among which the fullest expert is sought, in
      `shard_map`; this device alone if not given.
  """
  if count < 1 or alignment < 1:
    raise ValueError(f"{count=} and {alignment=} must be at least 1.")
  k = experts.shape[-1]
  share = -(-experts.size // k // count)
  needed = no_drop_capacity(experts, count)
  if axis is not None:
    needed = lax.pmax(needed, axis)
  # .57 * 100 is meant to be 57
  bound = k * jnp.floor(jnp.abs(factor) * share + 1e-3).astype(jnp.int32)
  least = jnp.minimum(needed, bound)
  room = jnp.where(factor > 0, bound, jnp.where(factor < 0, least, needed))
  return -(-room // alignment) * alignment


class TutelRouter(nnx.Module):
  """Puts the capacity rule on a router: itself one of `MixtureOfExperts`.

  Args:
    router: any top-k rule; its weights are the gates of the choices, not yet
      made to sum to 1.
    count: E.
    factor: f, the capacity factor.  A `Setting` takes a share of the room away.
    prioritized: whether sure items come first (batch-prioritized routing).
    alignment: the capacity is a multiple of it.
    allow_noncausal: let a causal model use a factor but 0 (static).
  """

  def __init__(
    self,
    router: nnx.Module,
    count: int,
    *,
    factor: float = 1.0,
    prioritized: bool = False,
    alignment: int = 1,
    allow_noncausal: bool = False,
  ):
    among = getattr(router, "count", count)
    if among != count:
      raise ValueError(
        f"the router chooses among {among} experts, not {count}."
      )
    if alignment < 1:
      raise ValueError(f"{alignment=} must be at least 1.")
    refuse_nan(factor=factor)
    self.router = router
    # what is dropped depends on the rest of the batch
    self.looks_ahead = factor != 0 and not allow_noncausal
    self.refused = Setting(jnp.zeros(()))
    self.count = count
    self.factor = factor
    self.prioritized = prioritized
    self.alignment = alignment

  def __call__(
    self,
    x: Float[Array, "*N D"],
    live: Bool[Array, "*N"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> Routing:
    routing = self.router(x, live, key)
    wanted = only_live(routing.experts, live)
    gates = jnp.where(wanted >= 0, routing.weights, 0)
    room = tutel_capacity(
      wanted, self.count, self.factor, alignment=self.alignment
    )
    room = jnp.floor(room * (1 - self.refused.get_value()) + 1e-3)
    room = jnp.clip(room, 0, gates.size).astype(jnp.int32)
    priority = gates.max(-1) if self.prioritized else None
    served = within_capacity(wanted, self.count, room, priority)
    dropped = ((wanted >= 0) & ~served).sum(dtype=jnp.float32)
    total = gates.sum(-1, keepdims=True)
    weights = gates / jnp.maximum(total, jnp.finfo(gates.dtype).eps)
    return routing._replace(
      experts=jnp.where(served, wanted, NOBODY),
      weights=weights if gates.shape[-1] > 1 else gates,
      dropped=routing.dropped + dropped,
    )
