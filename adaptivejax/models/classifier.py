# SPDX-License-Identifier: Apache-2.0
"""An encoder that can answer after every layer, for inputs that are not text.

An input is T tokens of F features: rows of an image, patches, frames.  Every
token sees every other: all have position 0, so no key lies in the future and
nothing is rotated; a learned embedding says where a token stands.  After each
layer the mean over tokens has an exit, a norm and a linear map, to C outputs.

`every_exit` is for training.  A call is for inference: after each layer a rule
says which rows may leave, and no layer runs for a row that left (only the small
attention scores are computed for all rows while any is left).

    rule(l, logits f32[B, C], pooled f[B, D], memory) -> (stop bool[B], memory)

Bind thresholds with `jax.tree_util.Partial`: they are data.

Axes: B batch, T tokens, F input features, D features, K exits, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from adaptivejax.core.buckets import bucketed
from adaptivejax.core.cost import Cost, Signals, flops, times
from adaptivejax.core.depth import depth_loop, most_of_layers
from adaptivejax.nn.attention import Attention
from adaptivejax.nn.block import Block, Layer
from adaptivejax.nn.linear import linear
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.norm import RMSNorm
from adaptivejax.nn.setting import refuse_outside
from adaptivejax.nn.stack import every_layer, layer_at


@dataclass(frozen=True)
class ClassifierConfig:
  """Shape of the model; all static."""

  tokens: int = 8  # of an input
  inputs: int = 8  # features of an input token
  classes: int = 10  # outputs of every exit
  layers: int = 6  # each with an exit
  features: int = 64  # of the residual stream
  hidden: int = 256  # inside the feed-forward layers
  heads: int = 4  # of attention

  def __post_init__(self):
    for name, value in vars(self).items():
      if value < 1:
        raise ValueError(f"`{name}` must be at least 1; got {value}.")


class Exits(NamedTuple):
  """What every exit says."""

  logits: Array  # f32[K, B, C]
  pooled: Array  # mean over tokens after each layer, f[K, B, D]
  cost: Cost  # of all layers and exits
  signals: Signals  # differentiable by-products, mean over layers


class Answer(NamedTuple):
  """What each row said when it left."""

  logits: Array  # f32[B, C], of the exit it took
  exit: Array  # layers run, i32[B], in 1..K
  cost: Cost  # of what was run, the rule included
  memory: Any  # of the rule, per row as of its exit


class Exit(nnx.Module):
  """A classifier on the pooled state."""

  def __init__(self, features: int, classes: int, *, rngs: nnx.Rngs):
    self.norm = RMSNorm(features)
    self.out = linear(features, classes, rngs=rngs, bias=True)

  def __call__(self, pooled: Float[Array, "B D"]) -> Float[Array, "B C"]:
    return self.out(self.norm(pooled)).astype(jnp.float32)


def never(l, logits, pooled, memory):
  """The rule that all rows run all layers."""
  del l, pooled
  return jnp.zeros(logits.shape[0], bool), memory


class Classifier(nnx.Module):
  """Embedding, layers, an exit after each.

  Args:
    config: shapes.
    layer: makes one layer, `layer(rngs) -> module`; a `Block` if not given.
    rngs: for the parameters.
  """

  def __init__(
    self,
    config: ClassifierConfig,
    *,
    layer: Callable[[nnx.Rngs], Layer] | None = None,
    rngs: nnx.Rngs,
  ):
    make = layer or (lambda rngs: encoder_block(config, rngs))
    stack = lambda make: jax.tree.map(
      lambda *a: jnp.stack(a), *[make(rngs) for _ in range(config.layers)]
    )
    width = config.features
    self.layers = stack(make)
    self.exits = stack(lambda rngs: Exit(width, config.classes, rngs=rngs))
    self.embedding = linear(config.inputs, width, rngs=rngs, bias=True)
    init = jax.nn.initializers.normal(width**-0.5)
    self.places = nnx.Param(init(rngs.params(), (config.tokens, width)))
    self.config = config

  def embed(self, inputs: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
    """The state before the first layer."""
    wanted = self.config.tokens, self.config.inputs
    if inputs.ndim != 3 or inputs.shape[1:] != wanted:
      raise ValueError(f"inputs must be [B, *{wanted}]; got {inputs.shape}.")
    places = self.places.get_value()
    return self.embedding(inputs.astype(places.dtype)) + places

  def every_exit(
    self, inputs: Float[Array, "B T F"], key: Key[Array, ""] | None = None
  ) -> Exits:
    """All layers and all exits: for training (with a `key`) and calibration."""
    x, positions, cost = self._start(inputs)
    out = every_layer(self.layers, x, positions, readout=None, key=key)
    pooled = _pool(out.hidden)
    say = lambda exit_pooled: exit_pooled[0](exit_pooled[1])
    logits = jax.lax.map(say, (self.exits, pooled))
    said = flops(say, (layer_at(self.exits, 0), pooled[0])) * len(pooled)
    cost += out.cost + Cost.dense(said, len(pooled) * len(inputs))
    return Exits(logits, pooled, cost, out.signals)

  def __call__(
    self,
    inputs: Float[Array, "B T F"],
    rule: Callable = never,
    memory: Any = None,
    *,
    min_exit: Int[Array, ""] | int = 1,
    max_exit: Int[Array, ""] | int | None = None,
  ) -> Answer:
    """Runs each row until the rule lets it go.

    Args:
      inputs: one input per row.
      rule: decides after each layer, for every row by itself.
      memory: what the rule starts from: a pytree, rows leading, or None.
      min_exit: layers that every row runs, 1..K (dynamic).
      max_exit: layers that no row runs more of, sure or not, 1..K (dynamic):
        whatever the inputs, they cost no more; K if not given.
    """
    total = self.config.layers
    most = total if max_exit is None else max_exit
    there = "the exits there are"
    refuse_outside(1, total, there, min_exit=min_exit, max_exit=most)
    x, positions, embedded = self._start(inputs)
    start = x, _pool(x), jnp.zeros((len(x), self.config.classes))

    def layer(block_exit, l, at, cost, live):
      block, say = block_exit
      tokens = jnp.broadcast_to(live[:, None], positions.shape)
      x, _, spent, _ = block(at[0], positions, None, l, tokens)
      pooled = _pool(x)
      logits, said = bucketed(lambda p, f: f(p), pooled, live, say, keep=False)
      return (x, pooled, logits), cost + spent + said

    def halt(l, before, after, memory):
      _, pooled, logits = after
      return rule(l, logits, pooled, memory)

    params = self.layers, self.exits
    out = depth_loop(
      layer,
      params,
      start,
      Cost.zero(),
      halt,
      memory,
      min_depth=min_exit,
      max_depth=most,
    )
    ran, cost = out.depth.max(), out.state
    asked = flops(rule, jnp.int32(0), start[2], start[1], memory)
    bound = most_of_layers(layer, params, start, Cost.zero(), most)
    cost = embedded + cost._replace(
      spent=cost.spent + asked * ran,
      full=cost.full * total / ran,
      bound=jnp.float32(bound + times(asked, most)),
    )
    return Answer(out.x[2], out.depth, cost, out.memory)

  def _start(self, inputs):
    """The embedded inputs, everybody's position, and the cost."""
    x = self.embed(inputs)
    positions = jnp.zeros(x.shape[:2], jnp.int32)
    work = flops(lambda m, a: m.embedding(a), self, inputs)
    return x, positions, Cost.dense(work, positions.size)


def encoder_block(config: ClassifierConfig, rngs: nnx.Rngs) -> Block:
  """The default layer of `config`."""
  attention = Attention(config.features, config.heads, rngs=rngs)
  mlp = Mlp(config.features, config.hidden, rngs=rngs)
  return Block(config.features, attention, mlp)


def _pool(x):
  """Mean over tokens, in f32."""
  return x.mean(-2, dtype=jnp.float32).astype(x.dtype)
