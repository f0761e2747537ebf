# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention with grouped queries and rotary positions.

Ainslie et al., 2023, https://arxiv.org/abs/2305.13245 (grouped queries).

Axes: B batch, T tokens, D features, H query heads, G key heads, W head width.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.attention import Keys, rotary
from adaptivejax.core.buckets import bucketed
from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import Cost, flops
from adaptivejax.core.rope import USUAL, Rope
from adaptivejax.core.varying import vary, varying_axes
from adaptivejax.nn.linear import linear
from adaptivejax.nn.look import Look


class Attention(nnx.Module):
  """Queries, keys and values of a token depend on that token alone.

  Args:
    features: D.
    heads: H.
    kv_heads: G, which divides H; H if not given.
    width: W; D / H if not given.
    bias: whether queries, keys and values have a bias.
    out_bias: whether the output has.
    norm: makes the norm over W of queries, and that of keys, from W; none if
      not given (Henry et al., 2020, https://arxiv.org/abs/2010.04245).
    rope: rotary positions (static).
    look: how queries look at keys; at all of them if not given.
    rngs: for the parameters.
  """

  def __init__(
    self,
    features: int,
    heads: int,
    kv_heads: int | None = None,
    *,
    width: int | None = None,
    bias: bool = False,
    out_bias: bool = False,
    norm: Callable[[int], nnx.Module] | None = None,
    rope: Rope = USUAL,
    look: Look | None = None,
    rngs: nnx.Rngs,
  ):
    kv_heads = heads if kv_heads is None else kv_heads
    if min(heads, kv_heads) < 1:
      raise ValueError(f"{heads=} and {kv_heads=} must be at least 1.")
    if heads % kv_heads:
      raise ValueError(f"{kv_heads=} must divide {heads=}.")
    self.width = head_width(features, heads, width)
    inner, outer = heads * self.width, 2 * kv_heads * self.width
    self.query = linear(features, inner, rngs=rngs, bias=bias)
    self.key_value = linear(features, outer, rngs=rngs, bias=bias)
    self.out = linear(inner, features, rngs=rngs, bias=out_bias)
    self.norm_query = None if norm is None else norm(self.width)
    self.norm_key = None if norm is None else norm(self.width)
    self.rope = rope
    self.look = (Look() if look is None else look).turning(rope)

  def queries(
    self, x: Float[Array, "*N D"], positions: Int[Array, "*N"]
  ) -> Float[Array, "*N H W"]:
    q = self.query(x).reshape(*x.shape[:-1], -1, self.width)
    return self._placed(_normed(q, self.norm_query), positions)

  def keys(
    self, x: Float[Array, "*N D"], positions: Int[Array, "*N"]
  ) -> tuple[Float[Array, "*N G W"], Float[Array, "*N G W"]]:
    """Keys and values of each token."""
    kv = self.key_value(x).reshape(*x.shape[:-1], 2, -1, self.width)
    k, v = kv[..., 0, :, :], kv[..., 1, :, :]
    return self._placed(_normed(k, self.norm_key), positions), v

  def _placed(self, x, positions):
    """With rotary positions, unless the look applies them."""
    return rotary(x, positions, self.rope) if self.look.rotated else x

  def empty_cache(self, x: Float[Array, "B T D"]) -> KVCache:
    """One layer with room for the keys of these tokens, see `recall`."""
    heads = self.key_value.kernel.shape[-1] // (2 * self.width)
    batch, tokens, _ = x.shape
    cache = self.look.empty_cache(1, batch, heads, tokens, self.width, x.dtype)
    return vary(cache, varying_axes(x))

  def project(self, x, positions) -> Keys:
    """The `Keys` that a block's tokens would write into the cache."""
    return _keys(*self.keys(x, positions), positions)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache: KVCache | None = None,
    layer: Int[Array, ""] | int = 0,
    live: Bool[Array, "B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None, Cost, Float[Array, ""]]:
    """Attends from the live tokens to the live tokens seen so far.

    Returns:
      `(y, cache, cost, penalty)`: zero for tokens that are not live, which also
      have no key at this layer; the cache with this layer's keys written; the
      look's auxiliary loss.
    """
    place = _place(positions, live)
    (q, k, v), cost = self._items(
      _project, (x, positions), live, positions.size
    )
    keys = _keys(k, v, place)
    asked = {"x": x, "live": live, "key": key}
    if cache is None:
      looked = self.look(q, keys, place, layer, **asked)
    else:
      looked, cache = self.look.step(q, keys, place, cache, layer, **asked)
    y, out_cost = self._items(_output, _flat(looked), live, positions.size)
    cost = cost + looked.cost + out_cost
    return y, cache, cost, jnp.asarray(looked.penalty, jnp.float32)

  def recall(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache: KVCache,
    layer: Int[Array, ""] | int = 0,
    live: Bool[Array, "B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B T D"], Cost, Float[Array, ""]]:
    """Attends from the live tokens to the keys that a layer holds already.

    The tokens' own keys are among them if these were written before; nothing is
    written now.  Returns `(y, cost, penalty)`.
    """
    q, cost = self._items(_query, (x, positions), live, positions.size)
    place = _place(positions, live)
    looked = self.look.recall(q, place, cache, layer, x=x, live=live, key=key)
    y, out_cost = self._items(_output, _flat(looked), live, positions.size)
    cost = cost + looked.cost + out_cost
    return y, cost, jnp.asarray(looked.penalty, jnp.float32)

  def _items(self, f, x, live, count):
    """`f(x, self)` on the live items only, or on all."""
    if live is not None:
      return bucketed(f, x, live, self, keep=False)
    return f(x, self), Cost.dense(flops(f, x, self), count)


def head_width(features: int, heads: int, width: int | None = None) -> int:
  """W: as given, or D / H.

  Raises:
    ValueError: a remainder, or a width that is odd, with no pairs to turn.
  """
  if heads < 1 or (width is None and features % heads):
    raise ValueError(
      f"{heads=} must divide {features=} into heads of even width, or `width`"
      " must be given."
    )
  width = features // heads if width is None else width
  if width < 1 or width % 2:
    raise ValueError(
      f"{heads=} of {features=} must have an even width; got {width=}."
    )
  return width


def _normed(x, norm):
  return x if norm is None else norm(x)


def _place(positions, live):
  """The position of a token, -1 where it is not live."""
  return positions if live is None else jnp.where(live, positions, -1)


def _keys(k, v, positions) -> Keys:
  """Head-major, the same tokens for all heads."""
  head_major = lambda a: jnp.moveaxis(a, 2, 1)
  return Keys(head_major(k), head_major(v), positions[:, None])


def _flat(looked):
  return looked.out.reshape(*looked.out.shape[:2], -1)


def _project(x_positions, attention):
  x, positions = x_positions
  return attention.queries(x, positions), *attention.keys(x, positions)


def _query(x_positions, attention):
  return attention.queries(*x_positions)


def _output(mixed, attention):
  return attention.out(mixed)
