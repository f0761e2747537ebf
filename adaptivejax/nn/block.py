# SPDX-License-Identifier: Apache-2.0
"""The pre-norm transformer block, in two halves that can be skipped apart.

A layer is called as `layer(x, positions, cache, index, live, key)` and returns
`(x, cache, cost, signals)`; `live` are the tokens it computes, the others pass
through untouched and have no key there.  Adaptive methods are masks on `live`,
so they compose by `&`.

Axes: B batch, T tokens, D features.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import Cost, Signals
from adaptivejax.nn.attention import Attention
from adaptivejax.nn.norm import RMSNorm

LayerOutput = tuple[Array, KVCache | None, Cost, Signals]


class Layer(nnx.Module):
  """What a model stacks; `depth` is the number of cache layers it uses."""

  depth: int = 1

  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache: KVCache | None = None,
    index: Int[Array, ""] | int = 0,
    live: Bool[Array, "B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> LayerOutput:
    """Runs the layer on its live tokens."""
    raise ValueError(f"{type(self).__name__} does not say how it is called.")


class Block(Layer):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  Args:
    features: D.
    attention, mlp: the two halves.
    norm: makes each norm, from D.
  """

  def __init__(
    self,
    features: int,
    attention: Attention,
    mlp: nnx.Module,
    *,
    norm: Callable[[int], nnx.Module] = RMSNorm,
  ):
    self.norm_attention = norm(features)
    self.attention = attention
    self.norm_mlp = norm(features)
    self.mlp = mlp

  def attend(
    self, x, positions, cache=None, index=0, live=None, key=None
  ) -> tuple[Array, KVCache | None, Cost, Array]:
    """The attention half; the last is the penalty of its look, f32[]."""
    h = self.norm_attention(only(live, x))
    y, cache, cost, penalty = self.attention(
      h, positions, cache, index, live, key
    )
    return x + y, cache, cost, penalty

  def feed(self, x, live=None, key=None) -> tuple[Array, Cost, Signals]:
    """The feed-forward half."""
    y, cost, signals = self.mlp(self.norm_mlp(only(live, x)), live, key)
    return x + y, cost, signals

  def recall(
    self, x, positions, cache, index=0, live=None, key=None
  ) -> LayerOutput:
    """The block again, over the keys it wrote: see `Attention.recall`."""
    h = self.norm_attention(only(live, x))
    y, cost, penalty = self.attention.recall(
      h, positions, cache, index, live, key
    )
    x, feed_cost, signals = self.feed(x + y, live, key)
    return x, cache, cost + feed_cost, signals.owing(penalty)

  def project_keys(self, x, positions):
    """The keys that tokens of value `x` would have at this layer."""
    return self.attention.project(self.norm_attention(x), positions)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache: KVCache | None = None,
    index: Int[Array, ""] | int = 0,
    live: Bool[Array, "B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> LayerOutput:
    x, cache, cost, penalty = self.attend(x, positions, cache, index, live, key)
    x, feed_cost, signals = self.feed(x, live, key)
    return x, cache, cost + feed_cost, signals.owing(penalty)


class Group(Layer):
  """Several different layers that repeat together, as one layer."""

  def __init__(self, layers: Sequence[Layer]):
    if not layers:
      raise ValueError("a group needs at least one layer; got none.")
    self.layers = nnx.List(layers)
    self.depth = sum(layer.depth for layer in layers)

  def __call__(
    self, x, positions, cache=None, index=0, live=None, key=None
  ) -> LayerOutput:
    cost, signals = Cost.zero(), []
    for i, layer in enumerate(self.layers):
      inner = None if key is None else jax.random.fold_in(key, i)
      x, cache, spent, signal = layer(x, positions, cache, index, live, inner)
      cost, index = cost + spent, index + layer.depth
      signals.append(signal)
    return x, cache, cost, Signals.join(signals)


def only(live, x):
  """Zero where not live: what is not computed must not reach a gradient."""
  nothing = jnp.zeros((), x.dtype)
  return x if live is None else jnp.where(live[..., None], x, nothing)
