# SPDX-License-Identifier: Apache-2.0
"""Looks that keep so many keys, by what these are worth.

Every query still sees all keys that are there, new ones among them; then the
least ones go.  A cache has a slot more than keys it keeps, so that a new key
always finds an empty one: a decoding step writes it and marks another empty.

Axes: B batch, T tokens, N keys looked at, S slots, H query heads, G key heads,
W head width.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.cache import KVCache, put
from adaptivejax.core.eviction import (
  best,
  candidates,
  evict,
  gather,
  replace_victim,
)
from adaptivejax.nn.look import Look, Looked, look_cost
from adaptivejax.nn.setting import Setting


class Worth(NamedTuple):
  """What the keys are worth, and what was found among them.

  Attributes:
    out: what the queries found, f[B, T, H, W].
    score: to remember of each key, f32[B, G, N].
    priority: by which keys stay, f32[B, G, N]; empty slots do not count.
    keep: keys that stay, i32[] or i32[B]; at most S - 1 do.
    asked: FLOPs of finding out, beside those of looking, f32[].
    spent: FLOPs of looking, f32[], if not those of all pairs.
  """

  out: Array
  score: Array
  priority: Array
  keep: Array
  asked: Array | float = 0.0
  spent: Array | None = None


class Evicting(Look):
  """Keeps up to `capacity` keys per head; a method says by which `worth`.

  Without a cache nothing is given up, and it looks at all keys.

  Args:
    capacity: keys kept between steps (static).

  `level`, a `Setting`, is the share of the capacity that is not used: 0 keeps
  `capacity` keys, 1 one.
  """

  evicts = True
  alone = True
  per_head = True

  def __init__(self, capacity: int):
    if capacity < 1:
      raise ValueError(f"{capacity=} must be at least 1 key.")
    self.capacity = capacity
    self.level = Setting(jnp.zeros(()))

  def share_of(self, keys: int) -> Int[Array, ""]:
    """So many of `keys` (static) as the level leaves, at least one."""
    left = jnp.round(keys * (1 - self.level.get_value()))
    return jnp.maximum(left, min(keys, 1)).astype(jnp.int32)

  def slots(self, slots: int) -> int:
    return min(slots, self.capacity + 1)

  def memory(self, batch, heads, slots, width, dtype) -> Any:
    del width, dtype
    return jnp.zeros((batch, heads, slots), jnp.float32)  # the score

  def worth(
    self,
    q: Float[Array, "B T H W"],
    keys: Keys,
    positions: Int[Array, "B T"],
    score: Float[Array, "B G N"],
  ) -> Worth:
    """Looks at the keys, and says what they are worth from now on.

    Args:
      q: queries.
      keys: those held, and the new ones with a score of 0.
      positions: of the queries, -1 where there is none.
      score: what was remembered of each key.
    """
    raise ValueError(f"{type(self).__name__} does not say what keys are worth.")

  def step(
    self, q, keys, positions, cache, layer=0, *, x=None, live=None, key=None
  ) -> tuple[Looked, KVCache]:
    del x, key
    decodes = keys.k.shape[2] == 1
    run = self.decode if decodes else self.prefill
    worth, cache, room = run(q, keys, positions, cache, layer)
    cost = look_cost(q, room, live)
    if worth.spent is not None:
      cost = cost._replace(spent=worth.spent)
    full = cache.length.mean(dtype=jnp.float32) + keys.k.shape[2]
    cost = cost.with_overhead(worth.asked)._replace(full=4.0 * q.size * full)
    return Looked(worth.out, cost), cache

  def decode(
    self, q, keys, positions, cache, layer
  ) -> tuple[Worth, KVCache, int]:
    """One token: its key takes an empty slot, and the least one leaves."""
    score = cache.recollect(layer)
    cache, slot = replace_victim(cache, layer, keys, score)
    new = jnp.arange(cache.slots) == slot[..., None]
    held = cache.read(layer)
    worth = self.worth(q, held, positions, jnp.where(new, 0, score))
    keep = jnp.minimum(worth.keep, cache.slots - 1)
    over = (held.pos >= 0).sum(-1) > jnp.reshape(keep, (-1, 1))
    least = jnp.where(held.pos < 0, jnp.inf, worth.priority).argmin(-1)
    gone = over[..., None] & (jnp.arange(cache.slots) == least[..., None])
    pos = jnp.where(gone, -1, held.pos)
    cache = cache._replace(pos=cache.pos.at[:, layer].set(pos))
    return worth, cache.remember(layer, worth.score), cache.slots

  def prefill(
    self, q, keys, positions, cache, layer
  ) -> tuple[Worth, KVCache, int]:
    """Many tokens: the best of what was held and of theirs stay."""
    both = candidates(cache.read(layer), keys)
    score = cache.recollect(layer)
    spare = [(0, 0), (0, 0), (0, both.pos.shape[-1] - cache.slots)]
    worth = self.worth(q, both, positions, jnp.pad(score, spare))
    priority = jnp.where(both.pos >= 0, worth.priority, -jnp.inf)
    keep = jnp.minimum(worth.keep, cache.slots - 1)
    index = best(priority, keep, cache.slots)
    cache = put(cache, layer, evict(both, index))
    cache = cache.remember(layer, gather(worth.score, index))
    return worth, cache, both.pos.shape[-1]


def newest(positions: Int[Array, "B T"], keys: Keys) -> Int[Array, "B 1 1"]:
  """The last position there is, of a query or of a key."""
  last = jnp.maximum(positions.max(-1), keys.pos.max((1, 2)))
  return last[:, None, None]
