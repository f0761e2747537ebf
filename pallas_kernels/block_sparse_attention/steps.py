# SPDX-License-Identifier: Apache-2.0
"""How `xla` cuts block-sparse attention into steps of few static shapes.

A step takes M tiles and the next W blocks of each.  A tile takes full steps of
about `KEYS` keys, and for what is left of its list the powers of two that make
it up, so that a list costs what it counts and few bodies are compiled.  Tiles
of one step all need it: they are sorted by how many full steps they take, and
picked for the others (as coins cover rows in `adaptivejax.core.covers`).

Axes: B batch, H query heads, G key heads, U units = heads that own a list (G or
H), R query heads of a unit, N tiles of all units, K key blocks, C entries of a
list, X rows of a tile (R x block_q); of one step: M tiles, W blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

KEYS = 1024
"""Keys of a full step."""

SCORES = 2**19
"""Scores of a step, at most: 2 MB stay in the cache."""

ROWS = 4096
"""Rows of a step, at most."""

WIDTHS = 4
"""Widths of steps, at most: more compile longer, fewer compute in vain."""


@dataclass(frozen=True)
class Cut:
  """The static sizes, and how arrays are cut into tiles and blocks."""

  batch: int
  heads: int
  groups: int
  units: int
  queries: int
  keys: int
  block_q: int
  block_kv: int

  @property
  def repeat(self) -> int:
    """R, query heads of a unit: they share its list and its keys."""
    return self.heads // self.units

  @property
  def tiles(self) -> int:
    """Tiles of one unit."""
    return -(-self.queries // self.block_q)

  @property
  def blocks(self) -> int:
    """K."""
    return -(-self.keys // self.block_kv)

  @property
  def items(self) -> int:
    """N."""
    return self.batch * self.units * self.tiles

  def widths(self, capacity: int) -> tuple[int, ...]:
    """Blocks of a step, powers of two, the full step first."""
    full = min(capacity, max(1, KEYS // self.block_kv)).bit_length() - 1
    return tuple(2**i for i in range(full, max(-1, full - WIDTHS), -1))

  def width_tiles(self, width: int) -> int:
    """M of the steps of one width."""
    rows = self.repeat * self.block_q
    most = min(SCORES // (rows * width * self.block_kv), ROWS // rows)
    return max(1, min(most, self.items))

  def tile(self, a: jax.Array, fill: float = 0) -> jax.Array:
    """[B, H, T, ...] -> [N, X, ...]."""
    tail = a.shape[3:]
    a = _fill(a, 2, self.tiles * self.block_q, fill)
    a = a.reshape(
      self.batch, self.units, self.repeat, self.tiles, self.block_q, *tail
    )
    a = jnp.swapaxes(a, 2, 3)
    return a.reshape(self.items, self.repeat * self.block_q, *tail)

  def untile(self, a: jax.Array) -> jax.Array:
    """[N, X, ...] -> [B, H, T, ...]."""
    tail = a.shape[2:]
    a = a.reshape(
      self.batch, self.units, self.tiles, self.repeat, self.block_q, *tail
    )
    a = jnp.swapaxes(a, 2, 3)
    return a.reshape(self.batch, self.heads, -1, *tail)[:, :, : self.queries]

  def tile_marks(self, a: jax.Array, fill: int) -> jax.Array:
    """[B, T] -> [B * tiles, block_q]."""
    return _fill(a, 1, self.tiles * self.block_q, fill).reshape(
      -1, self.block_q
    )

  def block(self, a: jax.Array, fill: int = 0) -> jax.Array:
    """[B, P, S, ...] -> [B * P * K, block_kv, ...]."""
    tail = a.shape[3:]
    a = _fill(a, 2, self.blocks * self.block_kv, fill)
    return a.reshape(-1, self.block_kv, *tail)

  def unblock(self, a: jax.Array, owners: int) -> jax.Array:
    """[B * P * K, block_kv, ...] -> [B, P, S, ...]."""
    a = a.reshape(self.batch, owners, -1, *a.shape[2:])
    return a[:, :, : self.keys]

  def tile_of(self, item: jax.Array) -> jax.Array:
    """Where the marks of an item's queries are."""
    unit, tile = jnp.divmod(item, self.tiles)
    return unit // self.units * self.tiles + tile

  def base_of(self, item: jax.Array, owners: int) -> jax.Array:
    """The first block of an item among those of P = 1 or G owners."""
    batch, unit = jnp.divmod(item // self.tiles, self.units)
    owner = unit * owners // self.units
    return (batch * owners + owner) * self.blocks


class Part(NamedTuple):
  """One step.

  Attributes:
    item: which tiles, i32[M]; N and more is none.
    entry: which entries of their lists, i32[M, W].
    live: whether they count, bool[M, W].
  """

  item: jax.Array
  entry: jax.Array
  live: jax.Array

  def take(self, a: jax.Array, none: float | None = None) -> jax.Array:
    """Rows of `a` [N, ...] that belong to the tiles; for none anything."""
    if none is None:
      return a.at[self.item].get(mode="clip")
    return a.at[self.item].get(mode="fill", fill_value=none)

  def put(self, a: jax.Array, rows: jax.Array) -> jax.Array:
    """`a` with those rows replaced."""
    return a.at[self.item].set(rows, mode="drop", unique_indices=True)


def sweep(
  cut: Cut,
  count: jax.Array,
  capacity: int,
  step: Callable[[Part, Any], Any],
  state: Any,
) -> Any:
  """`step(part, state) -> state` until every entry has had its turn.

  Args:
    cut: the static sizes.
    count: entries of each item's list, i32[N].
    capacity: C (static).
    step: traced once for each width; entries that are not `live` must change
      nothing.
    state: its carry.
  """
  full, *narrow = cut.widths(capacity)
  least = ([full] + narrow)[-1]
  rounded = -(-count // least) * least
  whole, rest = rounded // full, rounded % full
  get = lambda a, at, none: a.at[at].get(mode="fill", fill_value=none)

  def part(item, first, width):
    entry = first[:, None] + jnp.arange(width)
    return Part(item, entry, entry < get(count, item, 0)[:, None])

  order = jnp.argsort(-whole)
  many = (whole > 0).sum(dtype=jnp.int32)
  tiles = cut.width_tiles(full)

  def full_step(carry):
    """The `turn`-th step of the tiles from place `at` on."""
    at, turn, state = carry
    item = get(order, at + jnp.arange(tiles), cut.items)
    item = jnp.where(turn < get(whole, item, 0), item, cut.items)
    state = step(part(item, jnp.full_like(item, full) * turn, full), state)
    last = turn + 1 >= whole[order[at]]  # the first of them has the most
    return jnp.where(last, at + tiles, at), jnp.where(last, 0, turn + 1), state

  zero = jnp.zeros_like(many)
  unfinished = lambda carry: carry[0] < many
  *_, state = lax.while_loop(unfinished, full_step, (zero, zero, state))
  for width in narrow:
    due = rest // width % 2 == 1
    first = whole * full + rest // (2 * width) * (2 * width)
    order = jnp.argsort(~due)
    many = due.sum(dtype=jnp.int32)
    tiles = cut.width_tiles(width)

    def narrow_step(
      i, state, order=order, first=first, due=due, m=tiles, w=width
    ):
      item = get(order, i * m + jnp.arange(m), cut.items)
      item = jnp.where(get(due, item, False), item, cut.items)
      return step(part(item, get(first, item, 0), w), state)

    rounds = -(-many // tiles)
    state = lax.fori_loop(zero, rounds, narrow_step, state)
  return state


def _fill(a: jax.Array, axis: int, size: int, value: float) -> jax.Array:
  """`a` extended to `size` along `axis`."""
  if a.shape[axis] == size:
    return a
  pads = [(0, 0)] * a.ndim
  pads[axis] = (0, size - a.shape[axis])
  return jnp.pad(a, pads, constant_values=value)
