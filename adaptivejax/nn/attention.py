# SPDX-License-Identifier: Apache-2.0
"""Causal self-attention with grouped queries and rotary positions.

Ainslie et al., 2023, https://arxiv.org/abs/2305.13245 (grouped queries).

Axes: B batch, T tokens, D features, H query heads, G key heads, W head width.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys, attend, rotary
from adaptivejax.core.buckets import bucketed
from adaptivejax.core.cache import KVCache, append
from adaptivejax.core.cost import Cost, flops
from adaptivejax.core.varying import vary, varying_axes
from adaptivejax.nn.linear import linear


class Attention(nnx.Module):
  """Queries, keys and values of a token depend on that token alone."""

  def __init__(
    self,
    features: int,
    heads: int,
    kv_heads: int | None = None,
    *,
    rngs: nnx.Rngs,
  ):
    kv_heads = heads if kv_heads is None else kv_heads
    if min(heads, kv_heads) < 1:
      raise ValueError(f"{heads=} and {kv_heads=} must be at least 1.")
    if features % heads or heads % kv_heads or (features // heads) % 2:
      raise ValueError(
        f"{heads=} must divide {features=} into heads of even width, and"
        f" {kv_heads=} must divide {heads=}."
      )
    self.width = features // heads
    self.query = linear(features, features, rngs=rngs)
    self.key_value = linear(features, 2 * kv_heads * self.width, rngs=rngs)
    self.out = linear(features, features, rngs=rngs)

  def queries(
    self, x: Float[Array, "*N D"], positions: Int[Array, "*N"]
  ) -> Float[Array, "*N H W"]:
    q = self.query(x).reshape(*x.shape[:-1], -1, self.width)
    return rotary(q, positions)

  def keys(
    self, x: Float[Array, "*N D"], positions: Int[Array, "*N"]
  ) -> tuple[Float[Array, "*N G W"], Float[Array, "*N G W"]]:
    """Keys and values of each token."""
    kv = self.key_value(x).reshape(*x.shape[:-1], 2, -1, self.width)
    return rotary(kv[..., 0, :, :], positions), kv[..., 1, :, :]

  def empty_cache(self, x: Float[Array, "B T D"]) -> KVCache:
    """One layer with room for the keys of these tokens, see `recall`."""
    heads = self.key_value.kernel.shape[-1] // (2 * self.width)
    batch, tokens, _ = x.shape
    cache = KVCache.empty(1, batch, heads, tokens, self.width, x.dtype)
    return vary(cache, varying_axes(x))

  def project(self, x, positions) -> Keys:
    """The `Keys` that a block's tokens would write into the cache."""
    k, v = self.keys(x, positions)
    return Keys(jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), positions)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache: KVCache | None = None,
    layer: Int[Array, ""] | int = 0,
    live: Bool[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None, Cost]:
    """Attends from the live tokens to the live tokens seen so far.

    Returns:
      `(y, cache, cost)`: zero for tokens that are not live, which also have no
      key at this layer; the cache with this layer's keys appended.
    """
    count = positions.size
    (q, k, v), cost = self._items(_project, (x, positions), live, count)
    pos = positions if live is None else jnp.where(live, positions, -1)
    keys = Keys(jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), pos)
    mask = None
    if cache is not None:
      cache = append(cache, layer, keys)
      keys, mask = cache.read(layer), _tree_mask(cache, positions.shape[1])
    y, look_cost = self._look(q, keys, mask, positions, live)
    return y, cache, cost + look_cost

  def recall(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache: KVCache,
    layer: Int[Array, ""] | int = 0,
    live: Bool[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], Cost]:
    """Attends from the live tokens to the keys that a layer holds already.

    The tokens' own keys are among them if these were written before; nothing is
    written now.
    """
    q, cost = self._items(_query, (x, positions), live, positions.size)
    keys, mask = cache.read(layer), _tree_mask(cache, positions.shape[1])
    y, look_cost = self._look(q, keys, mask, positions, live)
    return y, cost + look_cost

  def _look(self, q, keys, mask, positions, live) -> tuple[Array, Cost]:
    """From queries to the output, over the keys."""
    mixed = attend(q, keys, positions, mask=mask)
    mixed = mixed.reshape(*positions.shape, -1)
    y, cost = self._items(_output, mixed, live, positions.size)
    return y, _attend_cost(q, keys, live) + cost

  def _items(self, f, x, live, count):
    """`f(x, self)` on the live items only, or on all."""
    if live is not None:
      return bucketed(f, x, live, self, keep=False)
    return f(x, self), Cost.dense(flops(f, x, self), count)


def _tree_mask(cache: KVCache, tokens: int) -> Bool[Array, "B T S"] | None:
  """Which slots the new tokens may see, when they are a tree of drafts."""
  if cache.tree is None:
    return None
  node = jnp.arange(cache.slots) - cache.length[:, None]  # [B, S]
  new = (node >= 0) & (node < tokens)
  at = jnp.clip(node, 0, tokens - 1)[:, None]
  return jnp.take_along_axis(cache.tree, at, axis=2) | ~new[:, None]


def _project(x_positions, attention):
  x, positions = x_positions
  return attention.queries(x, positions), *attention.keys(x, positions)


def _query(x_positions, attention):
  return attention.queries(*x_positions)


def _output(mixed, attention):
  return attention.out(mixed)


def _attend_cost(q, keys: Keys, live) -> Cost:
  """Scores and mixing are computed densely over the slots."""
  items = jnp.float32(q.shape[0] * q.shape[1])
  work = 4.0 * q.size * keys.k.shape[2]
  asked = items if live is None else live.sum(dtype=jnp.float32)
  return Cost(
    jnp.float32(work), jnp.float32(work), asked, items, jnp.float32(0)
  )
