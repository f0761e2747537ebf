# SPDX-License-Identifier: Apache-2.0
"""Looks that read a prompt sparsely and decode densely.

A method says which blocks and columns the queries of a prompt look at; how that
runs, and what it costs, is said here.  `coverage_of` tells how much attention a
choice would keep in a trained model.

Axes: B batch, T queries, S keys, H query heads, W head width, Q query tiles, K
key blocks, L layers, C looks.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.block_lists import lists_from_mask
from adaptivejax.core.block_masks import BLOCK, visible_blocks
from adaptivejax.core.column_attention import attend_columns, coverage
from adaptivejax.core.cost import flops
from adaptivejax.core.marks import marked
from adaptivejax.core.sparse_attention import attend_blocks
from adaptivejax.nn.look import Look, Looked, look_cost
from adaptivejax.nn.looks import with_look
from adaptivejax.nn.setting import Setting, refuse_nan


class Chosen(NamedTuple):
  """What the queries of a prompt look at.

  Attributes:
    mask: key blocks of each tile and head, bool[B, H, Q, K].
    columns: keys that all tiles of a head see besides, bool[B, H, S], or None.
  """

  mask: Array
  columns: Array | None = None


class SparsePrefill(Look):
  """Looks at what `choose` chooses; a method is a subclass of it.

  Fewer queries than a tile look at all keys: a generated token, or drafts of
  some.  With a cache a prompt looks at it sparsely too, in pieces or at once.

  Args:
    block_q: queries of a tile (static).
    block_kv: keys of a block (static).
    room: columns that a head may choose (static); any number if not given.
    level: of the `Setting`: 0 is the whole budget, 1 what is always seen.

  Attributes:
    most: blocks that a tile is meant to list, if known: no bound, but what who
      reads the compiled program may reckon with (static).
  """

  most: int | None = None

  def __init__(
    self,
    *,
    block_q: int = BLOCK,
    block_kv: int = BLOCK,
    room: int | None = None,
    level: float = 0.0,
  ):
    refuse_nan(level=level)
    if min(block_q, block_kv) < 1:
      raise ValueError(f"{block_q=} and {block_kv=} must be at least 1.")
    self.block_q, self.block_kv, self.room = block_q, block_kv, room
    self.level = Setting(jnp.float32(level))

  @property
  def blocks(self) -> dict[str, Any]:
    """The sizes of a tile and a block, as arguments."""
    return {"block_q": self.block_q, "block_kv": self.block_kv}

  def left(self, budget: int, least: int = 1) -> Int[Array, ""]:
    """What the level leaves of a budget in tokens or blocks, `least` or more.

    Both are static.
    """
    left = jnp.round(budget * self.share())
    return jnp.maximum(left, least).astype(jnp.int32)

  def share(self) -> Float[Array, ""]:
    """What the level leaves of all."""
    return 1 - self.level.get_value().astype(jnp.float32)

  def _told(self, blocks: int) -> contextlib.AbstractContextManager:
    """Marks the kernel's work in the program (`core.marks`)."""
    asked = blocks if self.most is None else min(self.most, blocks)
    return marked(rows=blocks, asked=asked)

  def choose(
    self,
    q: Float[Array, "B T H W"],
    keys: Keys,
    positions: Int[Array, "B T"],
    layer: Int[Array, ""] | int = 0,
  ) -> Chosen:
    """Blocks and columns for the queries; arguments as in a call."""
    raise ValueError(f"{type(self).__name__} does not say what it looks at.")

  def __call__(
    self,
    q: Float[Array, "B T H W"],
    keys: Keys,
    positions: Int[Array, "B T"],
    layer: Int[Array, ""] | int = 0,
    *,
    x: Float[Array, "B T D"] | None = None,
    live: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T S"] | None = None,
    key: Array | None = None,
  ) -> Looked:
    if q.shape[1] < self.block_q or mask is not None:
      asked = {"x": x, "live": live, "mask": mask, "key": key}
      return super().__call__(q, keys, positions, layer, **asked)
    chosen = self.choose(q, keys, positions, layer)
    if chosen.columns is None:
      lists = lists_from_mask(chosen.mask, **self.blocks)
      with self._told(chosen.mask.shape[-1]):
        found, spent = attend_blocks(q, keys, lists, positions)
      out = found.out
    else:
      out, spent = attend_columns(
        q,
        keys,
        chosen.mask,
        chosen.columns,
        positions,
        **self.blocks,
        room=self.room,
      )
    spent = spent.with_overhead(flops(self.choose, q, keys, positions, layer))
    cost = look_cost(q, keys.k.shape[2], live)
    return Looked(out, cost._replace(spent=spent.spent, bound=spent.bound))


class ByBlocks(SparsePrefill):
  """Looks at all keys: a prompt by blocks, without those of the future.

  The fastest way to read a long prompt densely, and so what others have to
  beat; its `Setting` does nothing.
  """

  def choose(self, q, keys: Keys, positions, layer=0) -> Chosen:
    del q, layer
    return Chosen(visible_blocks(positions, keys.pos, **self.blocks))


class Watch(Look):
  """Looks at all keys, and remembers how much of it others would keep.

  Args:
    looks: that are watched.
    heads: H (static).
    since: queries from this position on count for the mass (static).
  """

  learns = True

  def __init__(
    self, looks: Sequence[SparsePrefill], heads: int, since: int = 0
  ):
    self.looks, self.heads, self.since = nnx.List(looks), heads, since

  def memory(self, batch, heads, slots, width, dtype) -> Any:
    del heads, slots, width, dtype
    return jnp.zeros((batch, self.heads, len(self.looks), 2), jnp.float32)

  def step(
    self, q, keys, positions, cache, layer=0, *, x=None, live=None, key=None
  ):
    asked = {"x": x, "live": live, "key": key}
    kept = []
    for look in self.looks:
      chosen = look.choose(q, keys, positions, layer)
      blocks = {**look.blocks, "since": self.since}
      found = coverage(q, keys, *chosen, positions, **blocks)
      kept.append(jnp.stack(found, -1))
    cache = cache.remember(layer, jnp.stack(kept, 2))
    return super().step(q, keys, positions, cache, layer, **asked)


def coverage_of(
  model: nnx.Module,
  tokens: Int[Array, "B T"],
  looks: Sequence[SparsePrefill],
  heads: int,
  since: int = 0,
) -> tuple[Float[Array, "L H C"], Float[Array, "L H C"]]:
  """How much of a model's attention the looks would keep, each by itself.

  Args:
    model: called as `model(tokens, cache)`; whatever its own looks are, it is
      run with dense ones.
    tokens: a prompt to calibrate on.
    looks: of which the model takes none yet.
    heads: H (static).
    since: queries from this position on count for the mass (static).

  Returns:
    `(mass, pairs)`, see `core.coverage`, the mean over B.
  """
  watching: Any = with_look(model, Watch(looks, heads, since))
  cache = watching(tokens, watching.empty_cache(*tokens.shape)).cache
  kept = cache.memory.mean(0)
  return kept[..., 0], kept[..., 1]
