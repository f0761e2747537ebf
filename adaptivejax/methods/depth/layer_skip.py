# SPDX-License-Identifier: Apache-2.0
r"""LayerSkip: trains every layer to be an exit by dropping the later ones.

Elhoushi et al., 2024, https://arxiv.org/abs/2404.16710

Training (sec. 4.1) drops layer l of a sample with probability

    p(l) = S (exp(l ln 2 / (L - 1)) - 1) p_max,     l = 0..L-1,

and minimises sum_l c(l) e(l) CE_l / sum_l c(l) e(l) over the exits, with

    e(l) = s sum_{i<=l} i  for l < L-1,     e(L-1) = L - 1 + s sum_{i<=L-2} i,

where the curriculum c leaves every R-th exit, another each time, and the last.
Its decoding (sec. 4.3) is `methods.decode.SelfSpeculation`.

Primitive: the `live` mask (`bucketed`), one row of it per sample.
Departs: the curriculum starts at a random exit instead of rotating in order.
Axes: L layers, B batch, T tokens, D features.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from adaptivejax.nn.stack import StackOutput, layer_count


def dropout_rates(
  layers: int, p_max: float, scale: Float[Array, ""] | float = 1.0
) -> Float[Array, " L"]:
  """p(l): how often to drop each layer; `scale` is S, 1 in fine-tuning."""
  if not 0 <= p_max < 1:
    raise ValueError(f"{p_max=} must be a rate in [0, 1).")
  grow = jnp.exp(jnp.arange(layers) * jnp.log(2) / max(layers - 1, 1)) - 1
  return scale * p_max * grow


def exit_weights(
  layers: int,
  scale: float,
  *,
  every: int = 1,
  key: Key[Array, ""] | None = None,
) -> Float[Array, " L"]:
  """c(l) e(l): what the loss after each layer counts in this step.

  Args:
    layers: L (static).
    scale: s, in 0..1: how much the early exits count.
    every: R, the curriculum leaves one exit out of so many (static).
    key: which of them, if `every` is above 1.
  """
  if scale < 0 or not 1 <= every <= layers or (every > 1 and key is None):
    raise ValueError(
      f"{scale=} must not be below 0, and {every=} must lie in 1..{layers} and"
      " needs a `key` above 1."
    )
  l = jnp.arange(layers, dtype=jnp.float32)
  sums = scale * jnp.cumsum(l)
  last = layers - 1 + scale * sum(range(layers - 1))
  weights = sums.at[-1].set(last if layers > 1 else 1.0)
  if every > 1 and key is not None:
    first = jax.random.randint(key, (), 0, every)
    kept = (l.astype(jnp.int32) % every == first) | (l == layers - 1)
    weights = jnp.where(kept, weights, 0)
  return weights


def layer_dropout(
  layers,
  x: Float[Array, "B T D"],
  positions,
  cache=None,
  *,
  readout,
  key,
  rates: Float[Array, " L"],
) -> StackOutput:
  """The training stack: each sample skips layer l with probability rates[l].

  Other arguments as in `nn.stack`; `hidden` holds the state after every layer.
  A sample that skips a layer costs nothing there.
  """
  del readout
  count = layer_count(layers)
  noise, key = jax.random.split(key)
  drop = jax.random.uniform(noise, (count, x.shape[0])) < rates[:, None]

  @jax.checkpoint
  def body(carry, step):
    x, cache = carry
    layer, l, dropped, key = step
    live = jnp.broadcast_to(~dropped[:, None], x.shape[:2])
    x, cache, cost, signals = layer(
      x, positions, cache, l * layers.depth, live, key
    )
    return (x, cache), (x, cost, signals)

  steps = layers, jnp.arange(count), drop, jax.random.split(key, count)
  (x, cache), (hidden, cost, signals) = lax.scan(body, (x, cache), steps)
  depth = jnp.broadcast_to((~drop).sum(0)[:, None], x.shape[:2])
  return StackOutput(
    x,
    cache,
    cost.total(),
    signals.mean(),
    layers.depth * depth.astype(jnp.float32),
    cost.share,
    hidden,
  )
