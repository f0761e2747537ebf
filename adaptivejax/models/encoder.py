# SPDX-License-Identifier: Apache-2.0
"""Encoders: ViT, DINOv2 and BERT.

One model: an embedding (patches of an image or words), stacked and scanned
layers in which every token sees every other, a norm.  How the layers are run is
a stack, as in the decoder: one that loses tokens on the way (`methods.tokens`)
or one whose rows leave early (`nn.row_exit`).

Axes: B batch, N tokens, T of them that are left, D features, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, Shaped

from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.token_merging import Tokens, restore
from adaptivejax.nn.block import Layer
from adaptivejax.nn.embedding import PatchEmbedding, WordEmbedding
from adaptivejax.nn.encoder_layer import EncoderLayer
from adaptivejax.nn.linear import linear
from adaptivejax.nn.norm import LayerNorm
from adaptivejax.nn.stack import plain


@dataclass(frozen=True)
class ImageInput:
  """Square images, cut into patches; all static."""

  image: int = 224  # side in pixels, that the positions are for
  patch: int = 16  # side in pixels
  channels: int = 3
  masks: bool = False  # with a token for hidden patches, as in DINOv2


@dataclass(frozen=True)
class TextInput:
  """Texts; all static."""

  vocab: int = 30522
  context: int = 512  # tokens of a text, at most
  types: int = 2  # kinds of segments


@dataclass(frozen=True)
class EncoderConfig:
  """Shape of the model; all static.  The default is a ViT-S/16."""

  input: ImageInput | TextInput = ImageInput()
  layers: int = 12
  features: int = 384  # of the residual stream
  hidden: int = 1536  # inside the feed-forward layers
  heads: int = 6
  post_norm: bool = False  # norms after the sums, as in BERT, and none at last
  layer_scale: bool = False  # as in DINOv2
  pooler: bool = False  # a layer with tanh on the first token
  epsilon: float = 1e-6  # of the norms

  def __post_init__(self):
    sizes = {**vars(self), **vars(self.input)}
    for name, value in sizes.items():
      if isinstance(value, int) and not isinstance(value, bool) and value < 1:
        raise ValueError(f"`{name}` must be at least 1; got {value}.")


class EncoderOutput(NamedTuple):
  """What the model made of its input.

  Attributes:
    x: tokens after the last norm, f[B, T, D]: those that are left.
    pooled: the first token, that of the class, through the pooler if there is
      one, f[B, D].
    cost: FLOPs of embedding, layers and pooler.
    signals: differentiable by-products, mean over layers.
    depth: layers run per token, f32[B, N].
    shares: realised share of compute of every layer, f32[L].
    hidden: after every layer, before the norm, f[L, B, N, D], if the stack
      returns it.
    tokens: where the original tokens are, if some were lost on the way.
    notes: what else the stack says.
  """

  x: Array
  pooled: Array
  cost: Cost
  signals: Signals
  depth: Array
  shares: Array
  hidden: Array | None = None
  tokens: Tokens | None = None
  notes: Any = None

  @property
  def restored(self) -> Float[Array, "B N D"]:
    """What became of every token: itself, what it merged into, or what it was
    when it was given up (0 where the stack does not remember that).
    """
    if self.tokens is None:
      return self.x
    return restore(self.tokens, self.x, self.tokens.left)


def encoder_layer(config: EncoderConfig, rngs: nnx.Rngs) -> EncoderLayer:
  """The default layer of `config`."""
  return EncoderLayer(
    config.features,
    config.heads,
    config.hidden,
    post_norm=config.post_norm,
    layer_scale=config.layer_scale,
    epsilon=config.epsilon,
    rngs=rngs,
  )


class Encoder(nnx.Module):
  """Embedding, layers, norm, pooler.

  Args:
    config: shapes.
    layer: makes one layer, `layer(rngs) -> module`; an `EncoderLayer` if not
      given.
    rngs: for the parameters.
  """

  def __init__(
    self,
    config: EncoderConfig,
    *,
    layer: Callable[[nnx.Rngs], Layer] | None = None,
    rngs: nnx.Rngs,
  ):
    make = layer or (lambda rngs: encoder_layer(config, rngs))
    self.embedding = _embedding(config, rngs)
    layers = [make(rngs) for _ in range(config.layers)]
    self.layers = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    width, epsilon = config.features, config.epsilon
    self.norm = None if config.post_norm else LayerNorm(width, epsilon=epsilon)
    self.pooler = (
      linear(width, width, rngs=rngs, bias=True) if config.pooler else None
    )
    self.config = config

  def readout(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    """What the state after any layer says of the whole input."""
    first = x[:, 0] if self.norm is None else self.norm(x[:, 0])
    return first if self.pooler is None else jnp.tanh(self.pooler(first))

  def __call__(
    self,
    inputs: Shaped[Array, "B ..."],
    *,
    types: Int[Array, "B N"] | None = None,
    lengths: Int[Array | np.ndarray, " B"] | None = None,
    stack: Callable = plain,
    key: Key[Array, ""] | None = None,
  ) -> EncoderOutput:
    """All tokens, or those that the stack leaves, after the last layer.

    Args:
      inputs: images, channels last and normalised; or texts.
      types: of a text's tokens; all 0 if not given.
      lengths: real tokens of each text, the rest being padding on the right
        whose outputs mean nothing (dynamic); all if not given.
      stack: how the layers are run, see `nn.stack`.
      key: given in training, asks for the differentiable form.
    """
    real, images = None, isinstance(self.config.input, ImageInput)
    if images and not (types is None and lengths is None):
      raise ValueError("`types` and `lengths` are of texts; these are images.")
    if lengths is not None:
      real = jnp.arange(inputs.shape[1]) < lengths[:, None]
      inputs = jnp.where(real, inputs, inputs[:, :1])  # padding: a live token
    x, cost = self._embed(inputs, types)
    positions = jnp.zeros(x.shape[:2], jnp.int32)
    positions = positions if real is None else jnp.where(real, positions, -1)
    out = stack(self.layers, x, positions, None, readout=self.readout, key=key)
    say = lambda m, x: m.readout(x)
    cost += out.cost + Cost.dense(flops(say, self, out.x), len(x))
    norm = (lambda x: x) if self.norm is None else self.norm
    tokens = out.notes if isinstance(out.notes, Tokens) else None
    if tokens is not None and tokens.left is not None:
      tokens = tokens._replace(left=norm(tokens.left))
    return EncoderOutput(
      norm(out.x),
      self.readout(out.x),
      cost,
      out.signals,
      out.depth,
      out.shares,
      out.hidden,
      tokens,
      out.notes,
    )

  def _embed(self, inputs, types):
    """Tokens, and what they cost."""
    if isinstance(self.config.input, TextInput):
      if inputs.ndim != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ValueError(
          "texts must be integers [batch, length]; got"
          f" {inputs.dtype}{list(inputs.shape)}."
        )
      return self.embedding(inputs, types), Cost.zero()
    x = self.embedding(inputs)
    work = flops(lambda m, a: m(a), self.embedding, inputs)
    return x, Cost.dense(work, x.shape[0] * x.shape[1])


def mean_of_tokens(
  x: Float[Array, "B N D"], lengths: Int[Array | np.ndarray, " B"] | None = None
) -> Float[Array, "B D"]:
  """The mean over real tokens, as sentence encoders pool."""
  if lengths is None:
    return x.mean(1)
  real = (jnp.arange(x.shape[1]) < lengths[:, None])[..., None]
  total = jnp.where(real, x, 0).sum(1)
  return total / jnp.maximum(lengths, 1)[:, None].astype(x.dtype)


def _embedding(config: EncoderConfig, rngs: nnx.Rngs) -> Any:
  size, width = config.input, config.features
  if isinstance(size, ImageInput):
    shape = size.image, size.patch, size.channels
    return PatchEmbedding(*shape, width, masks=size.masks, rngs=rngs)
  return WordEmbedding(
    size.vocab,
    size.context,
    size.types,
    width,
    epsilon=config.epsilon,
    rngs=rngs,
  )
