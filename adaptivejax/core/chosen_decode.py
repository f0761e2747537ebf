# SPDX-License-Identifier: Apache-2.0
"""Attention of a new token over a choice of tokens or pages, of any number.

Lists have a static capacity and choices have not.  So there are lists of a few
capacities, of which the shortest that fits runs; a choice too long for all, or
of everything, reads the cache in place:

    work = min {C in capacity / 4, capacity / 2, capacity, all : C >= count}

Axes: B batch, T new tokens, S slots, H query heads, D head width, L heads that
own a choice (1, or the key heads G), N units of the cache.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.batching import looped
from adaptivejax.core.cost import Cost
from adaptivejax.core.sparse_decode import (
  masked_decode,
  sparse_decode,
  units_from_mask,
)
from adaptivejax.core.varying import vary, varying_axes
from pallas_kernels.block_sparse_attention.types import Attended
from pallas_kernels.sparse_decode_attention import Units


def decode_chosen(
  q: Float[Array, "B T H D"],
  keys: Keys,
  chosen: Bool[Array, "B L N"],
  positions: Int[Array, "B T"],
  *,
  layer: Int[Array, ""] | int | None = None,
  unit: int = 1,
  capacity: int | None = None,
  mass: bool = False,
) -> tuple[Attended, Cost]:
  """Softmax attention of up to 16 new tokens over the chosen keys they see.

  Exact for every choice.  What one row needs, all rows of the batch run; under
  `vmap` examples go one by one.

  Args:
    q: queries of the new tokens.
    keys: a layer of the cache; with `layer` all of them, [B, layers, ...], of
      which one is read where it lies: to take it out would be to copy it.
    chosen: which units may be looked at (dynamic).
    positions: of the new tokens, -1 for none.
    layer: which one (dynamic).
    unit: slots in a unit (static).
    capacity: units of the longest list (static); N if None.
    mass: return the attention that each key got, f32[B, H, S]; where a unit is
      more than a key, in rows that choose everything, and 0 in others.

  Returns:
    `Attended`, its `out` as q; and the cost: `spent` is that of the lists that
    ran, `items` are keys chosen.
  """
  slots = _check(keys, chosen, unit, capacity)
  count = chosen.shape[2]
  rungs = list_capacities(count if capacity is None else capacity, count)
  shape = q.shape[0], q.shape[2], slots

  def listed(size):
    def run(q, keys, chosen, positions, layer):
      units = units_from_mask(chosen, unit, size)
      keys, table = _in_place(keys, layer, unit)
      by_key = mass and unit == 1
      attended, cost = sparse_decode(
        q, keys, units, positions, page_table=table, mass=by_key
      )
      got = jnp.zeros(shape, jnp.float32) if mass else None
      if attended.mass is not None:
        got = _by_key(attended.mass, units, got)
      return attended._replace(mass=got), cost

    return run

  def whole(q, keys, chosen, positions, layer):
    only = _marked(_taken_out(keys, layer), chosen, unit)
    attended, cost = sparse_decode(q, only, None, positions, mass=mass)
    return _of_everything(attended, chosen, unit), cost

  branches = [*map(listed, rungs), whole]
  operands = q, keys, chosen, positions, layer
  axes = varying_axes(operands)

  def choose(*operands):
    need = operands[2].sum(-1, dtype=jnp.int32).max()
    over = (need > jnp.asarray(rungs, jnp.int32)).sum()
    same = [lambda *a, f=f: vary(f(*a), axes) for f in branches]
    return lax.switch(over, same, *operands)

  attended, cost = looped(choose)(*vary(operands, axes))
  pairs = 2.0 * q[..., 0].size * keys.pos.shape[-1]  # in the worst case all
  bound = jnp.float32(pairs * (keys.k.shape[-1] + keys.v.shape[-1]))
  return attended, cost._replace(items=_items(chosen, unit, cost), bound=bound)


def decode_chosen_masked(
  q: Float[Array, "B T H D"],
  keys: Keys,
  chosen: Bool[Array, "B L N"],
  positions: Int[Array, "B T"],
  *,
  layer: Int[Array, ""] | int | None = None,
  unit: int = 1,
  capacity: int | None = None,
  mass: bool = False,
) -> tuple[Attended, Cost]:
  """The dense twin of `decode_chosen`: all pairs, and a mask of the chosen."""
  _check(keys, chosen, unit, capacity)
  only = _marked(_taken_out(keys, layer), chosen, unit)
  attended, cost = masked_decode(q, only, None, positions, mass=mass)
  attended = _of_everything(attended, chosen, unit)
  return attended, cost._replace(items=_items(chosen, unit, cost))


def list_capacities(capacity: int, count: int) -> tuple[int, ...]:
  """Of the lists that are compiled for a cache of `count` units (static)."""
  rungs = {-(-capacity // part) for part in (4, 2, 1)}
  return tuple(sorted(rung for rung in rungs if rung < count))


def _taken_out(keys: Keys, layer) -> Keys:
  if layer is None:
    return keys
  pick = lambda a: lax.dynamic_index_in_dim(a, layer, 1, keepdims=False)
  return jax.tree.map(pick, keys)


def _in_place(keys: Keys, layer, unit):
  """A layer as a pool, each of whose pages is a row of a layer, and its table.

  Where units are not whole parts of these, the layer is taken out.
  """
  one = _taken_out(keys, layer)  # costs nothing where it is not used
  if layer is None or keys.k.shape[3] % unit:
    return one, None
  batch, layers = keys.k.shape[:2]
  rows = lambda a: a.reshape(batch * layers, *a.shape[2:])
  table = jnp.arange(batch, dtype=jnp.int32) * layers + layer
  pool = Keys(rows(keys.k), rows(keys.v), one.pos)
  return pool, table[:, None]


def _marked(keys: Keys, chosen, unit) -> Keys:
  """With position -1 where a key is not chosen."""
  pos = keys.pos
  mask = jnp.repeat(chosen, unit, axis=2)[..., : pos.shape[2]]
  return keys._replace(pos=jnp.where(mask, pos, -1))


def _of_everything(attended: Attended, chosen, unit) -> Attended:
  if attended.mass is None or unit == 1:
    return attended
  everything = chosen.all((1, 2))[:, None, None]
  return attended._replace(mass=jnp.where(everything, attended.mass, 0))


def _by_key(mass: Float[Array, "B H K"], units: Units, nothing):
  """The attention of listed keys at their slots, in `nothing` [B, H, S]."""
  share = mass.shape[1] // units.index.shape[1]
  listed = jnp.arange(mass.shape[2]) < units.count[..., None]
  at = jnp.where(listed, units.index, nothing.shape[2])
  put = lambda row, at, a: row.at[at].set(a, mode="drop")
  return jax.vmap(jax.vmap(put))(nothing, jnp.repeat(at, share, axis=1), mass)


def _items(chosen, unit, cost: Cost):
  asked = chosen.sum(dtype=jnp.float32) * unit
  return jnp.minimum(asked, cost.capacity)


def _check(keys: Keys, chosen, unit, capacity) -> int:
  """Slots of the cache."""
  groups, slots = keys.k.shape[-3:-1]
  if unit < 1 or (capacity is not None and capacity < 1):
    raise ValueError(f"{unit=} and {capacity=} must be at least 1.")
  units = -(-slots // unit)
  if chosen.shape[1] not in (1, groups) or chosen.shape[2] != units:
    raise ValueError(
      f"`chosen` must say for 1 or {groups} key heads which of {units} units of"
      f" {unit} slots to look at; got {chosen.shape}. Join choices of query"
      " heads that share keys by `group_reduce` of their scores."
    )
  return slots
