# SPDX-License-Identifier: Apache-2.0
"""A decoder-only language model with stacked, scanned layers.

One call serves training (no cache), prefill (a cache and a prompt) and decode
(a cache and one token): tokens are appended after what the cache holds.

Axes: B batch, T tokens, D features, L layers, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.per_device import settled
from adaptivejax.core.varying import vary, varying_axes
from adaptivejax.models.decoder_layer import DecoderConfig, decoder_block
from adaptivejax.nn.block import Layer
from adaptivejax.nn.linear import linear
from adaptivejax.nn.looks import empty_cache_of, refuse_drafts
from adaptivejax.nn.stack import plain
from adaptivejax.nn.stacked import stacked


class LMOutput(NamedTuple):
  """What the model says and spent.

  Attributes:
    logits: f32[B, T, V], or [B, R, V] of some tokens of each row.
    cache: advanced by T tokens, or None.
    cost: FLOPs of layers and readout.
    signals: differentiable by-products, mean over layers.
    depth: layers run per token, f32[B, T].
    shares: realised share of compute of every layer, f32[L].
    hidden: after every layer, f[L, B, T, D], if the stack returns it.
    notes: what else the stack says.
  """

  logits: Array
  cache: KVCache | None
  cost: Cost
  signals: Signals
  depth: Array
  shares: Array
  hidden: Array | None
  notes: Any = None


class DecoderLM(nnx.Module):
  """Embedding, layers, norm, readout.

  Args:
    config: shapes.
    layer: makes one layer, `layer(rngs) -> module`; `decoder_block` if not
      given.  A layer may hold several (`nn.Group`).
    rngs: for the parameters.
  """

  def __init__(
    self,
    config: DecoderConfig,
    *,
    layer: Callable[[nnx.Rngs], Layer] | None = None,
    rngs: nnx.Rngs,
  ):
    make = layer or (lambda rngs: decoder_block(config, rngs))
    self.layers = stacked(make, lambda one: _repeats(config, one), rngs)
    init = jax.nn.initializers.normal(config.features**-0.5)
    self.embedding = nnx.Param(
      init(rngs.params(), (config.vocab, config.features))
    )
    self.norm = config.norm(config.features)
    self.head = (
      None if config.tied else linear(config.features, config.vocab, rngs=rngs)
    )
    self.config = config

  def embed(self, tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """The hidden state that a token enters the layers with."""
    x, scale = self.embedding.get_value()[tokens], self.config.embedding_scale
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

  def readout(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Logits of a hidden state of any layer, f32."""
    x = self.norm(x)
    if self.head is None:
      table = self.embedding.get_value().T
    else:
      table = self.head.kernel.get_value()
    return jnp.matmul(
      x, table.astype(x.dtype), preferred_element_type=jnp.float32
    )

  def empty_cache(self, batch: int, slots: int) -> KVCache:
    """A cache for `batch` rows of up to `slots` tokens (static).

    Raises:
      ValueError: layers whose looks need different caches.
    """
    c = self.config
    dtype = self.embedding.get_value().dtype
    shape = c.layers, batch, c.kv_heads, slots, c.width, dtype
    return empty_cache_of(self.layers, *shape)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    cache: KVCache | None = None,
    *,
    lengths: Int[Array | np.ndarray, " B"] | None = None,
    tree: Bool[Array, "B T T"] | None = None,
    read_at: Int[Array, " B"] | Int[Array, "B R"] | None = None,
    stack: Callable = plain,
    key: Key[Array, ""] | None = None,
  ) -> LMOutput:
    """Logits for the token after each of `tokens`.

    Args:
      tokens: appended after what `cache` holds; ask `cache.full` for room.
      cache: keys of earlier tokens; none in training.
      lengths: real tokens of each row, the rest being padding on the right
        whose outputs mean nothing (dynamic); all if not given.
      tree: tokens that each token sees, itself included, where they are a tree
        of drafts and not a text (`core.trees.ancestors`); needs a cache.  The
        cache comes back with the tree in it but not advanced: `commit_path`.
      read_at: the tokens of each row whose logits are wanted, as [B, R, V], or
        the one, as [B, 1, V] (dynamic); all T if not given.
      stack: how the layers are run, see `nn.stack`.
      key: given in training, asks for the differentiable form.
    """
    _check_tokens(tokens)
    batch, length = tokens.shape
    if cache is not None:
      _check_cache(cache, self, batch)
      if tree is not None:
        refuse_drafts(self, "a tree of tokens")
      cache = cache._replace(tree=tree)
    elif tree is not None:
      raise ValueError("a tree of tokens needs a `cache` to be appended to.")
    place, count = _place(length, lengths, tree)
    start = 0 if cache is None else cache.length[:, None]
    positions = jnp.where(place >= 0, start + place, -1)
    positions = jnp.broadcast_to(positions, (batch, length))
    x = settled(self.embed(tokens))
    cache = vary(cache, varying_axes(x))
    out = stack(self.layers, x, positions, cache, readout=self.readout, key=key)
    x = out.x
    if read_at is not None:
      if read_at.ndim not in (1, 2) or len(read_at) != batch:
        raise ValueError(
          f"{read_at.shape=} must be [B] or [B, R] of {batch=} rows."
        )
      at = read_at[:, None] if read_at.ndim == 1 else read_at
      x = jnp.take_along_axis(x, at[..., None], axis=1)
    logits = self.readout(x)
    read = flops(lambda m, x: m.readout(x), self, x)
    return LMOutput(
      logits,
      None if cache is None else _advance(out.cache, count),
      out.cost + Cost.dense(read, batch * length),
      out.signals,
      out.depth,
      out.shares,
      out.hidden,
      out.notes,
    )


def _place(tokens: int, lengths, tree):
  """Place of each token after the past, -1 for none; and tokens to count."""
  place = jnp.arange(tokens, dtype=jnp.int32)[None]
  if tree is not None:
    return tree.sum(-1, dtype=jnp.int32) - 1, 0
  if lengths is not None:
    return jnp.where(place < lengths[:, None], place, -1), lengths
  return place, tokens


def _advance(cache: KVCache, count) -> KVCache:
  return cache._replace(tree=None).advance(count)


def _check_tokens(tokens) -> None:
  shape = jnp.shape(tokens)
  if len(shape) != 2 or 0 in shape:
    raise ValueError(
      f"tokens must be [batch, length] with at least one of each; got {shape=}."
    )
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens must be integers; got {tokens.dtype}.")


def _check_cache(cache: KVCache, model: DecoderLM, batch: int) -> None:
  wanted = jax.eval_shape(lambda: model.empty_cache(batch, cache.slots))
  shapes = lambda c: jax.tree.map(jnp.shape, c._replace(tree=None))
  if shapes(cache) != shapes(wanted):
    raise ValueError(
      f"the cache, {cache.k.shape}, is not of this model and batch,"
      f" {wanted.k.shape}, with what its looks keep beside: make it with"
      f" `model.empty_cache({batch}, slots)`."
    )


def _repeats(config: DecoderConfig, layer: Layer) -> int:
  """How many such layers are stacked."""
  _refuse_looking_ahead(layer)
  if config.layers % layer.depth:
    raise ValueError(
      f"{config.layers=} must be a multiple of the {layer.depth} layers that"
      " repeat together."
    )
  return config.layers // layer.depth


def _refuse_looking_ahead(layer: Layer) -> None:
  """Raises ValueError if a part of `layer` says that it `looks_ahead`."""
  for _, part in nnx.iter_modules(layer):
    if getattr(part, "looks_ahead", False):
      raise ValueError(
        f"{type(part).__name__} looks at the tokens to come, which a decoder"
        " has not got when it generates. It is for encoders; pass it"
        " `allow_noncausal=True` if this is meant."
      )
