# SPDX-License-Identifier: Apache-2.0
"""Looks that keep all keys, and read few of them for each new token.

A method says by `choose` which units of the cache, tokens or pages, the next
token looks at.  Several tokens at once, such as a prompt, look at all keys.

Axes: B batch, T tokens, S slots, N units, L heads that own a choice (1, or the
key heads G), H query heads, W head width.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.cache import KVCache
from adaptivejax.core.chosen_decode import decode_chosen
from adaptivejax.nn.look import Look, Looked, look_cost
from adaptivejax.nn.setting import Setting


class Choice(NamedTuple):
  """What a token looks at.

  Attributes:
    mask: of the units, bool[B, L, N].
    asked: FLOPs of finding out, f32[].
    most: what these cannot exceed (static); they themselves, if not given.
    memory: of this layer from now on, or None if it stays.
  """

  mask: Array
  asked: Array | float = 0.0
  memory: Any = None
  most: float | None = None


class Choosing(Look):
  """Looks at chosen units; a method says by `choose` at which.

  Args:
    capacity: most units that are chosen where not all are (static); more is
      right, but reads the whole cache.
    unit: tokens in a unit (static).
    dense_layers: the first layers, where all keys are looked at (static).

  `level`, a `Setting`, is the share of a method's budget that is not used.

  Attributes:
    weighs: `learn` is to be told the attention that keys got (static).
  """

  alone = True
  weighs: bool = False

  def __init__(self, capacity: int, unit: int = 1, dense_layers: int = 0):
    if capacity < 1 or unit < 1 or dense_layers < 0:
      raise ValueError(
        f"a choice of {capacity} units of {unit} tokens, in layers from"
        f" {dense_layers} on: at least 1, 1 and 0 are needed."
      )
    self.capacity, self.unit = capacity, unit
    self.dense_layers = dense_layers
    self.level = Setting(jnp.zeros(()))

  def share_of(self, units: int, least: int = 1) -> Int[Array, ""]:
    """So many of `units` (static) as the level leaves, `least` at least."""
    left = jnp.round(units * (1 - self.level.get_value()))
    return jnp.maximum(left, min(units, least)).astype(jnp.int32)

  def choose(
    self,
    q: Float[Array, "B H W"],
    cache: KVCache,
    layer: Int[Array, ""] | int,
  ) -> Choice:
    """What each row's next token looks at.

    Args:
      q: its queries.
      cache: its key is written, and not counted by `length`: that is its slot.
      layer: which one (dynamic).
    """
    raise ValueError(f"{type(self).__name__} does not say what it looks at.")

  def learn(
    self,
    choice: Choice,
    mass: Float[Array, "B H S"] | None,
    cache: KVCache,
    layer: Int[Array, ""] | int,
  ) -> Any:
    """The memory from now on, or None if it stays.

    Args:
      choice: as it was.
      mass: attention that keys got, in rows that looked at all; 0 in others;
        None unless it `weighs`.
      cache, layer: as above.
    """
    del mass, cache, layer
    return choice.memory

  def everywhere(
    self, mask: Bool[Array, "B L N"], layer: Int[Array, ""] | int
  ) -> Bool[Array, "B L N"]:
    """The choice, or all in the first layers."""
    return mask | (jnp.asarray(layer) < self.dense_layers)

  def step(
    self, q, keys, positions, cache, layer=0, *, x=None, live=None, key=None
  ) -> tuple[Looked, KVCache]:
    cache = self.append(cache, layer, keys)
    asked = {"x": x, "live": live, "key": key}
    looked, memory = self._look(q, positions, cache, layer, **asked)
    if memory is not None:
      cache = cache.remember(layer, memory)
    return looked, cache

  def recall(
    self, q, positions, cache, layer=0, *, x=None, live=None, key=None
  ) -> Looked:
    asked = {"x": x, "live": live, "key": key}
    return self._look(q, positions, cache, layer, **asked)[0]

  def _look(self, q, positions, cache, layer, *, x, live, key):
    if q.shape[1] > 1 or cache.tree is not None:
      asked = {"x": x, "live": live, "key": key}
      return super().recall(q, positions, cache, layer, **asked), None
    choice = self.choose(q[:, 0], cache, layer)
    attended, cost = decode_chosen(
      q,
      Keys(cache.k, cache.v, cache.pos),
      choice.mask,
      positions,
      layer=jnp.asarray(layer),
      unit=self.unit,
      capacity=self.capacity,
      mass=self.weighs,
    )
    spent = cost.spent + choice.asked
    most = choice.asked if choice.most is None else choice.most
    bound = cost.bound + most
    cost = look_cost(q, cache.slots, live)
    cost = cost._replace(spent=spent, bound=bound)
    memory = self.learn(choice, attended.mass, cache, layer)
    return Looked(attended.out, cost), memory
