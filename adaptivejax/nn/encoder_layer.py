# SPDX-License-Identifier: Apache-2.0
"""The transformer layer of encoders: every token sees every other.

All tokens have position 0, so no key lies in the future, and padding has -1;
nothing is rotated.  Before or after the norm, with biases:

    x + s attention(norm(x)), then x + s mlp(norm(x))        (ViT, DINOv2)
    norm(x + attention(x)), then norm(x + mlp(x))            (BERT)

s is LayerScale (Touvron et al., 2021, https://arxiv.org/abs/2103.17239).

Axes: B batch, T tokens, D features, H heads, W head width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.attention import Keys, attention_weights
from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.nn.attention import Attention
from adaptivejax.nn.block import Layer, LayerOutput, only
from adaptivejax.nn.look import Look
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.norm import LayerNorm

exact_gelu = functools.partial(jax.nn.gelu, approximate=False)
"""GELU by the error function, as these models were trained."""


class Unplaced(Look):
  """Looks at all keys, which know nothing of positions."""

  rotated = False


class Seen(NamedTuple):
  """What a layer's attention saw, for a method that reduces tokens.

  Attributes:
    q: queries, f[B, T, H, W].
    keys: keys and values; position -1 in dead slots.
  """

  q: Array
  keys: Keys

  @property
  def metric(self) -> Float[Array, "B T W"]:
    """The mean over heads of the keys: what a token offers to others."""
    return jnp.swapaxes(self.keys.k, 1, 2).mean(2, dtype=jnp.float32)

  @property
  def first(self) -> Float[Array, "B H T"]:
    """How the first token, that of the class, attends to all."""
    zero = jnp.zeros((self.q.shape[0], 1), jnp.int32)
    return attention_weights(self.q[:, :1], self.keys, zero)[:, :, 0]


class EncoderLayer(Layer):
  """Attention and feed-forward halves.

  Args:
    features: D.
    heads: H.
    hidden: inside the feed-forward half.
    post_norm: the norm comes after the sum (static).
    layer_scale: both halves are scaled, feature by feature (static).
    epsilon: of the norms.
    rngs: for the parameters.
  """

  def __init__(
    self,
    features: int,
    heads: int,
    hidden: int,
    *,
    post_norm: bool = False,
    layer_scale: bool = False,
    epsilon: float = 1e-6,
    rngs: nnx.Rngs,
  ):
    self.attention = Attention(
      features, heads, look=Unplaced(), bias=True, out_bias=True, rngs=rngs
    )
    self.mlp = Mlp(
      features, hidden, activation=exact_gelu, bias=True, rngs=rngs
    )
    self.norm_attention = LayerNorm(features, epsilon=epsilon)
    self.norm_mlp = LayerNorm(features, epsilon=epsilon)
    scale = lambda: nnx.Param(jnp.ones(features)) if layer_scale else None
    self.scale_attention, self.scale_mlp = scale(), scale()
    self.post_norm = post_norm

  def mix(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    bias: Float[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], Seen, Cost]:
    """The attention half, and what it saw; `bias` is that of the keys."""
    h = x if self.post_norm else self.norm_attention(x)
    attention = self.attention
    q = attention.queries(h, positions)
    k, v = (jnp.swapaxes(a, 1, 2) for a in attention.keys(h, positions))
    bias = None if bias is None else bias[:, None]
    keys = Keys(k, v, positions[:, None], bias)
    looked = attention.look(q, keys, positions, x=h)
    y = attention.out(looked.out.reshape(x.shape))
    weights = attention.query, attention.key_value, attention.out
    product = 2.0 * sum(w.kernel.size for w in weights)
    dense = Cost.dense(product * positions.size, positions.size)
    x = self._add(x, y, self.scale_attention, self.norm_attention)
    return x, Seen(q, keys), looked.cost + dense

  def attend(
    self, x, positions, cache=None, index=0, live=None, key=None
  ) -> tuple[Array, None, Cost, Array]:
    """The attention half on live tokens; the last is the look's penalty."""
    if cache is not None:
      raise ValueError(
        "an encoder layer has no cache: its tokens see those to come."
      )
    h = x if self.post_norm else self.norm_attention(only(live, x))
    y, _, cost, penalty = self.attention(h, positions, None, index, live, key)
    new = self._add(x, y, self.scale_attention, self.norm_attention)
    return _live_only(live, new, x), None, cost, penalty

  def feed(self, x, live=None, key=None) -> tuple[Array, Cost, Signals]:
    """The feed-forward half."""
    h = x if self.post_norm else self.norm_mlp(only(live, x))
    y, cost, signals = self.mlp(h, live, key)
    new = self._add(x, y, self.scale_mlp, self.norm_mlp)
    return _live_only(live, new, x), cost, signals

  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache=None,
    index: Int[Array, ""] | int = 0,
    live: Bool[Array, "B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> LayerOutput:
    x, cache, cost, penalty = self.attend(x, positions, cache, index, live, key)
    x, feed_cost, signals = self.feed(x, live, key)
    return x, cache, cost + feed_cost, signals.owing(penalty)

  def flops(self, x: Float[Array, "B T D"]) -> float:
    """FLOPs of the whole layer on tokens of this shape, all of them live."""
    here = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)
    return flops(lambda m, x, p: m(x, p)[0], self, x, here)

  def _add(self, x, y, scale, norm):
    if scale is not None:
      y = y * scale.get_value().astype(y.dtype)
    return norm(x + y) if self.post_norm else x + y


def _live_only(live, new, old):
  return new if live is None else jnp.where(live[..., None], new, old)
