# SPDX-License-Identifier: Apache-2.0
"""Looks that choose key blocks by summaries of windows of keys.

A window is `size` slots, the next one begins `stride` later.  Blocks and
windows are of slots, that is of tokens in the order of the text, with or
without a cache; so a token finds the same however a text is cut into calls.
The memory of such a look are the summaries.  An append computes anew those of
the windows that it writes into, from the keys that the cache holds: so drafts
may be taken back, and a token costs size / stride windows.

Axes: B batch, T tokens, S slots, H query heads, G key heads, W head width,
D features, N windows, C slots of a window.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import flops
from adaptivejax.nn.linear import linear
from adaptivejax.nn.look import Look, Looked


class Summary(nnx.Module):
  """C vectors as one: an MLP of all their features, moved by their places.

  Args:
    size, width: C and W.
    hidden: width of the MLP.
    rngs: for the parameters.
  """

  def __init__(self, size: int, width: int, hidden: int, *, rngs: nnx.Rngs):
    self.place = nnx.Param(0.02 * rngs.normal((size, width)))
    self.up = linear(size * width, hidden, rngs=rngs)
    self.down = linear(hidden, width, rngs=rngs)

  def __call__(self, a: Float[Array, "*N C W"]) -> Float[Array, "*N W"]:
    a = a + self.place.get_value().astype(a.dtype)
    return self.down(jax.nn.gelu(self.up(a.reshape(*a.shape[:-2], -1))))


class ByBlock(Look):
  """A subclass says what a summary is, and what is found with them.

  Args:
    size: slots of a window (static).
    stride: slots from one window to the next, at most `size` (static).
  """

  def __init__(self, size: int, stride: int):
    self.size, self.stride = size, stride

  def windows(self, slots: int) -> int:
    """N, windows that begin among `slots` slots (static)."""
    return -(-slots // self.stride)

  def summarise(
    self,
    k: Float[Array, "B G N C W"],
    v: Float[Array, "B G N C W"],
    there: Bool[Array, "B P N C"],
  ) -> Any:
    """Summaries, with leaves [B, G, N, ...], of windows; 0 where no key is."""
    raise ValueError(f"{type(self).__name__} does not say how to summarise.")

  def find(
    self,
    q: Float[Array, "B T H W"],
    keys: Keys,
    summaries: Any,
    positions: Int[Array, "B T"],
    slots: Int[Array, "B T"],
    x: Float[Array, "B T D"] | None,
  ) -> Looked:
    """What the queries find.

    Args:
      q, keys: as in `Look`.
      summaries: of all windows; those that a query's slot is in, or before, are
        not complete for it.
      positions: of the queries, -1 where there is none.
      slots: of the queries' own keys, -1 where there is none.
      x: what the attention was given.
    """
    raise ValueError(f"{type(self).__name__} does not say what it finds.")

  def __call__(
    self, q, keys: Keys, positions, layer=0, *, x=None, live=None, mask=None,
    key=None,
  ) -> Looked:  # fmt: skip
    del layer, live, key
    self._refuse(mask)
    if q.shape[1] != keys.k.shape[2]:
      raise ValueError(
        f"{q.shape[1]} queries and {keys.k.shape[2]} keys: without a cache the"
        " keys are those of the queries' own tokens, in order."
      )
    slots = jnp.where(positions >= 0, jnp.arange(q.shape[1]), -1)
    count = self.windows(keys.k.shape[2])
    summaries = self._all_summaries(keys)
    looked = self.find(q, keys, summaries, positions, slots, x)
    return self._priced(looked, keys, count)

  def step(
    self, q, keys: Keys, positions, cache: KVCache, layer=0, *, x=None,
    live=None, key=None,
  ) -> tuple[Looked, KVCache]:  # fmt: skip
    looked, cache = super().step(
      q, keys, positions, cache, layer, x=x, live=live, key=key
    )
    total, tokens = self.windows(cache.slots), keys.k.shape[2]
    _, count = self.touched(cache.length, tokens, total)
    return self._priced(looked, keys, count), cache

  def append(self, cache: KVCache, layer, keys, rows=None) -> KVCache:
    """Writes keys, and the summaries of the windows that they are in."""
    cache = super().append(cache, layer, keys, rows)
    total = self.windows(cache.slots)
    first, count = self.touched(cache.length, keys.k.shape[2], total)
    new = self._summaries(cache.read(layer), first, count)
    at = first[:, None] + jnp.arange(count)
    row = jnp.arange(len(first))[:, None]
    put = lambda old, new: old.at[row, layer, :, at].set(
      jnp.moveaxis(new, 2, 1).astype(old.dtype)
    )
    return cache._replace(memory=jax.tree.map(put, cache.memory, new))

  def recall(
    self, q, positions, cache: KVCache, layer=0, *, x=None, live=None, key=None
  ) -> Looked:
    del live, key
    self._refuse(cache.tree)
    keys, summaries = cache.read(layer), cache.recollect(layer)
    return self.find(q, keys, summaries, positions, positions, x)

  def touched(
    self, length: Int[Array, " B"], tokens: int, total: int
  ) -> tuple[Int[Array, " B"], int]:
    """First and number (static) of the windows that new tokens are in."""
    count = min((tokens + self.size - 2) // self.stride + 1, total)
    first = (length - self.size + self.stride) // self.stride
    return jnp.clip(first, 0, total - count), count

  def _summaries(self, keys: Keys, first: Int[Array, " B"], count: int):
    """Of `count` windows of each row, beginning with the first."""
    begin = (first[:, None] + jnp.arange(count)) * self.stride
    slot = begin[..., None] + jnp.arange(self.size)  # [B, N, C]
    row = jnp.arange(len(first))[:, None, None]

    def take(a, none):
      """[B, G, N, C, ...] from [B, G, S, ...]."""
      a = a.at[row, :, slot].get(mode="fill", fill_value=none)
      return jnp.moveaxis(a, 3, 1)

    return self._summaries_of(keys, take)

  def _all_summaries(self, keys: Keys):
    """Of all windows, cut and not gathered: over devices, keys stay there."""
    count, strides = self.windows(keys.k.shape[2]), -(-self.size // self.stride)
    long = (count + strides - 1) * self.stride

    def take(a, none):
      spare = [(0, 0)] * a.ndim
      spare[2] = 0, long - a.shape[2]
      a = jnp.pad(a, spare, constant_values=none)
      a = a.reshape(*a.shape[:2], -1, self.stride, *a.shape[3:])
      parts = [a[:, :, i : i + count] for i in range(strides)]
      return jnp.concatenate(parts, 3)[:, :, :, : self.size]

    return self._summaries_of(keys, take)

  def _summaries_of(self, keys: Keys, take: Callable[..., Array]):
    """Of windows [B, G, N, C, ...] that `take` makes of [B, G, S, ...]."""
    there = take(keys.pos, -1) >= 0
    clean = lambda a: jnp.where(there[..., None], take(a, 0), 0)
    return self.summarise(clean(keys.k), clean(keys.v), there)

  def _priced(self, looked: Looked, keys: Keys, count: int) -> Looked:
    """With the FLOPs of `count` summaries of each row."""
    batch, heads, _, width = keys.k.shape
    shape = batch, heads, count, self.size
    window = jax.ShapeDtypeStruct((*shape, width), keys.k.dtype)
    there = jax.ShapeDtypeStruct((batch, 1, *shape[2:]), jnp.bool_)
    spent = flops(self.summarise, window, window, there)
    return looked._replace(cost=looked.cost.with_overhead(spent))

  def _refuse(self, tree) -> None:
    if tree is not None:
      raise ValueError(
        f"{type(self).__name__} chooses among blocks of a text, which a tree of"
        " drafts is not: draft chains instead of trees."
      )
