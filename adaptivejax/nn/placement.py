# SPDX-License-Identifier: Apache-2.0
"""Where tokens go among the experts, and experts in another order.

Axes: L layers, B batch, T tokens, E experts, K choices per token.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

from adaptivejax.core.dispatch import NOBODY
from adaptivejax.nn.expert_sharding import mixtures
from adaptivejax.nn.routing import Routing
from adaptivejax.nn.stack import StackOutput, layer_count


def routing_trace(layers, x, positions, cache=None, *, readout, key=None):
  """A stack that notes the experts of every token, i32[L, B, T, K].

  L counts the mixtures of experts on the way, whichever layers they are in.
  """
  del readout, key

  def body(carry, step):
    (x, cache), (layer, i) = carry, step
    log: dict[int, Array] = {}
    for place, mixture in enumerate(mixtures(layer)):
      note = functools.partial(log.setdefault, place)  # the first call counts
      mixture.router = _Noted(mixture.router, note)
    x, cache, cost, signals = layer(x, positions, cache, i * layers.depth)
    if not log:
      raise ValueError("these layers hold no `MixtureOfExperts` to trace.")
    return (x, cache), (cost, signals, jnp.stack([*log.values()]))

  count = layer_count(layers)
  steps = layers, jnp.arange(count, dtype=jnp.int32)
  (x, cache), (cost, signals, seen) = lax.scan(body, (x, cache), steps)
  depth = jnp.full(x.shape[:2], count * layers.depth, jnp.float32)
  return StackOutput(
    x,
    cache,
    cost.total(),
    signals.mean(),
    depth,
    cost.share,
    notes=seen.reshape(-1, *seen.shape[2:]),
  )


def reorder_experts(model: Any, order: Int[np.ndarray, "..."]) -> Any:
  """The same function, the experts of its one mixture in another order.

  Routers stay as they are and their answers are renamed: ties, and groups of
  experts, are what they were.

  Args:
    model: holds one `MixtureOfExperts`, whose layers may be stacked.
    order: which expert comes where, i32[E]; i32[L, E] for stacked layers.
  """
  model = jax.tree.map(lambda a: a, model)  # a copy
  found = mixtures(model)
  if len(found) != 1:
    raise ValueError(f"the model must hold one mixture; it has {len(found)}.")
  (mixture,), order = found, np.asarray(order)
  held = mixture.experts.down.kernel.shape[:-2]
  if order.shape != held or (np.sort(order) != np.arange(held[-1])).any():
    raise ValueError(
      f"`order` must permute the experts, {held}, of each layer; got an array"
      f" of shape {order.shape}."
    )
  index = lambda a: order.reshape(*order.shape, *[1] * (a.ndim - order.ndim))
  pick = lambda a: jnp.take_along_axis(a, index(a), axis=order.ndim - 1)
  mixture.experts = jax.tree.map(pick, mixture.experts)
  mixture.router = Renamed(mixture.router, np.argsort(order, axis=-1))
  return model


class Renamed(nnx.Module):
  """A router whose expert e is now called `name[e]`."""

  def __init__(self, router: nnx.Module, name: Int[np.ndarray, "..."]):
    self.router = router
    self.name = nnx.Variable(jnp.asarray(name, jnp.int32))

  def __call__(self, x, live=None, key=None) -> Routing:
    routing = self.router(x, live, key)
    there = routing.experts >= 0
    name = self.name.get_value()[jnp.where(there, routing.experts, 0)]
    return routing._replace(experts=jnp.where(there, name, NOBODY))


class _Noted(nnx.Module):
  """A router that tells what it decides."""

  def __init__(self, router: nnx.Module, note: Callable[[Array], Any]):
    self.router = router
    self.note = note

  def __call__(self, x, live=None, key=None) -> Routing:
    routing = self.router(x, live, key)
    self.note(routing.experts)
    return routing
