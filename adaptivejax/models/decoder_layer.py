# SPDX-License-Identifier: Apache-2.0
"""What a decoder is made of: its shape, its layers.

One set of switches makes Llama, Mistral, Qwen, Gemma and their like.
"""

from dataclasses import dataclass
from functools import partial

import jax
from flax import nnx

from adaptivejax.core.rope import USUAL, Rope
from adaptivejax.nn.attention import Attention, head_width
from adaptivejax.nn.block import Block
from adaptivejax.nn.look import Look
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.norm import RMSNorm
from adaptivejax.nn.window import Window

ACTIVATIONS = {
  "gelu": partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": jax.nn.gelu,
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
}
"""By name."""


@dataclass(frozen=True)
class DecoderConfig:
  """Shape of the model; all static."""

  vocab: int = 256
  """Tokens in the vocabulary; 256 is bytes."""
  layers: int = 8
  """Layers with attention."""
  features: int = 192
  """Width of the residual stream."""
  hidden: int = 768
  """Width inside the feed-forward layers."""
  heads: int = 6
  """Query heads."""
  kv_heads: int = 6
  """Key/value heads; divides `heads`."""
  gated: bool = False
  """SwiGLU feed-forward instead of GELU."""
  tied: bool = True
  """Read out with the transposed embedding."""
  head_width: int | None = None
  """Features of a head, even; `features / heads` if not given."""
  activation: str | None = None
  """Of `ACTIVATIONS`; "silu" if gated, else "gelu_tanh", if not given."""
  rope: Rope = USUAL
  """Rotary positions."""
  window: int | None = None
  """Tokens that a query sees, its own included; all if not given."""
  qkv_bias: bool = False
  """Queries, keys and values have a bias."""
  out_bias: bool = False
  """The output of attention has."""
  mlp_bias: bool = False
  """The feed-forward layers have."""
  norm_heads: bool = False
  """Each query and key is normed over the features of its head."""
  norm_epsilon: float = 1e-6
  """Added to mean squares."""
  norm_offset: float = 0.0
  """Added to the scales of the norms of the residual stream."""
  embedding_scale: float = 1.0
  """What embeddings are multiplied with."""

  def __post_init__(self):
    for name in ("vocab", "layers", "features", "hidden", "heads", "kv_heads"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"`{name}` must be at least 1; got {getattr(self, name)}."
        )
    if self.activation not in (None, *ACTIVATIONS):
      raise ValueError(
        f"`activation` must be one of {[*ACTIVATIONS]}; got {self.activation!r}"
      )

  @property
  def width(self) -> int:
    """Features of a head."""
    return head_width(self.features, self.heads, self.head_width)

  def norm(self, features: int) -> RMSNorm:
    """A norm of the residual stream."""
    return RMSNorm(features, epsilon=self.norm_epsilon, offset=self.norm_offset)


def decoder_block(
  config: DecoderConfig,
  rngs: nnx.Rngs,
  mlp: nnx.Module | None = None,
  look: Look | None = None,
) -> Block:
  """The default layer of `config`, with another feed-forward or look."""
  if look is None and config.window is not None:
    look = Window(config.window)
  attention = Attention(
    config.features,
    config.heads,
    config.kv_heads,
    width=config.head_width,
    bias=config.qkv_bias,
    out_bias=config.out_bias,
    norm=partial(RMSNorm, epsilon=config.norm_epsilon)
    if config.norm_heads
    else None,
    rope=config.rope,
    look=look,
    rngs=rngs,
  )
  mlp = decoder_mlp(config, config.hidden, rngs) if mlp is None else mlp
  return Block(config.features, attention, mlp, norm=config.norm)


def decoder_mlp(config: DecoderConfig, hidden: int, rngs: nnx.Rngs) -> Mlp:
  """A feed-forward module of `config`, of any width inside."""
  usual = "silu" if config.gated else "gelu_tanh"
  return Mlp(
    config.features,
    hidden,
    gated=config.gated,
    activation=ACTIVATIONS[config.activation or usual],
    bias=config.mlp_bias,
    rngs=rngs,
  )
