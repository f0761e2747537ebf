# SPDX-License-Identifier: Apache-2.0
"""Attention of queries that choose key blocks each for itself.

The same result in three ways, none of which drops a choice.  By tiles, where
neighbours choose alike: a tile of queries lists the union of their blocks, and
marks who looks at which; in the worst case it computes all.  By blocks, where
they do not: the choices are sorted by block, as those of experts are, so that a
tile looks at one block, and each query joins what its choices found; never more
than the choices and a part of a tile for each block.  And for single new tokens
the listed pages of a cache.

Axes: B batch, T queries, S keys, H query heads, G key heads, L lists (G or H),
R query heads of a list, D head width, K blocks, N choices of a query; X queries
of all lists of a key head, Q tiles, U tile rows.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.block_lists import lists_from_tokens
from adaptivejax.core.cost import Cost
from adaptivejax.core.dispatch import dispatch
from adaptivejax.core.per_device import layout_of, on_each_device
from adaptivejax.core.per_head import over_heads, tokens_here
from adaptivejax.core.select import best
from adaptivejax.core.sparse_attention import attend_blocks
from adaptivejax.core.sparse_decode import sparse_decode
from pallas_kernels.block_sparse_attention import (
  BlockLists,
  Marks,
  Rule,
  merge_lse,
)
from pallas_kernels.sparse_decode_attention import Units

ROWS = 128
"""Rows of a tile, at most: queries, times the heads that share their list."""

LEAST = 8
"""Queries of a tile, at least."""


def attend_chosen(
  q: Array,
  keys: Keys,
  chosen: Int[Array, "B L T N"],
  positions: Int[Array, "B T"],
  *,
  block: int,
  window: int | None = None,
  by: str = "tile",
) -> tuple[Array, Cost]:
  """Causal softmax attention of each query over the union of its blocks.

  What it means for keys and queries that are not there, or not finite, is as in
  `attend_blocks`.

  Args:
    q: queries, f[B, T, H, D].
    keys: block k is the slots k * block .. (k + 1) * block - 1.
    chosen: of each query, distinct blocks, then -1 for none (dynamic).
    positions: of the queries; -1 sees nothing.
    block: keys in a block (static).
    window: how many positions a query sees, its own included (static).
    by: see above; one query of a row is neither (static).

  Returns:
    `(out f[B, T, H, D], cost)`: items are choices, by heads; `full` is all
    pairs.

  Raises:
    ValueError: no such way, or lists that are not those of heads.
  """
  batch, tokens, heads, width = q.shape
  (groups, size), (lists, most) = keys.k.shape[1:3], chosen.shape[1::2]
  if by not in ("tile", "block") or lists not in (groups, heads) or block < 1:
    raise ValueError(
      f"{by=} must be tile or block, the {lists} lists as many as the {groups}"
      f" key heads or the {heads} query heads, and {block=} at least 1 key."
    )
  there = (chosen >= 0).sum(dtype=jnp.float32) * (heads // lists)
  if tokens == 1:
    count = (chosen[:, :, 0] >= 0).sum(-1, dtype=jnp.int32)
    units = Units(jnp.maximum(chosen[:, :, 0], 0), count, block)
    rule = Rule(window=window)
    found, cost = sparse_decode(q, keys, units, positions, rule=rule)
    out, rows = found.out, jnp.float32(batch * heads * most)
  elif by == "tile":
    here = tokens_here(tokens)
    tall = _power(ROWS * lists // heads, here)
    if here < tokens:  # a tile stays on its device
      tall = math.gcd(tall, here)
    blocks = -(-size // block)
    named = lists_from_tokens(
      chosen,
      blocks,
      block_q=tall,
      block_kv=block,
      capacity=min(blocks, tall * most),
      truncate=True,
    )
    found, cost = attend_blocks(q, keys, named, positions, window=window)
    out, rows = found.out, cost.items * tall
  else:
    out, cost, rows = _by_block(q, keys, chosen, positions, block, window)
  full = 2.0 * q.size * size * (1 + keys.v.shape[3] / width)
  full = jnp.full_like(cost.spent, full)
  return out, cost._replace(full=full, items=there, capacity=rows)


def best_blocks(
  worth: Float[Array, "B L T K"], k: int, left: Array | int
) -> Int[Array, "B L T N"]:
  """The `left` (dynamic) best of at most `k` (static) blocks, then -1.

  Ties go to the earlier block; -inf and NaN are never chosen.
  """

  def some(worth, left):
    index = best(worth, min(k, worth.shape[-1]))
    found = jnp.take_along_axis(worth, index, axis=-1)
    used = (found > -jnp.inf) & (jnp.arange(index.shape[-1]) < left)
    return jnp.where(used, index, -1), ()

  worth, left = jnp.moveaxis(worth, 2, 1), jnp.asarray(left)
  layout = layout_of(worth.shape[:2])
  if layout.axes:  # the compiler brings together what it sorts
    index, _ = on_each_device(some, worth, left, layout)
  else:
    index, _ = some(worth, left)
  return jnp.moveaxis(index, 1, 2)


def attend_window(
  q: Array,
  keys: Keys,
  slots: Int[Array, "B T"],
  positions: Int[Array, "B T"],
  block: int,
  window: int,
) -> tuple[Array, Cost]:
  """Attention to the last `window` positions, by the blocks they are in.

  Args:
    q, keys, positions, block, window: as in `attend_chosen`.
    slots: of the queries, -1 for none.
  """
  back = jnp.arange((window + block - 2) // block + 1)
  near = jnp.maximum((slots // block)[:, None, :, None] - back, -1)
  near = jnp.repeat(near, keys.k.shape[1], axis=1)
  return attend_chosen(q, keys, near, positions, block=block, window=window)


def over_queries(
  f: Callable[..., Array], arrays: tuple[Array, ...], chunk: int = 256
) -> Array:
  """`f` of some queries at a time, so that their scores are never all there.

  Args:
    f: of `arrays`, their T being at most `chunk`, gives [B, L, T, N].
    arrays: [B, T, ...].
    chunk: queries of one device at a time (static).
  """
  tokens = arrays[0].shape[1]
  here = tokens_here(tokens)
  if here <= chunk:
    return f(*arrays)
  devices, pieces = tokens // here, -(-here // chunk)

  def cut(a):
    """[pieces, B, devices * chunk, ...]: of each device a few at a time."""
    a = a.reshape(len(a), devices, here, *a.shape[2:])
    spare = [(0, 0), (0, 0), (0, pieces * chunk - here)]
    a = jnp.pad(a, spare + [(0, 0)] * (a.ndim - 3))
    a = a.reshape(len(a), devices, pieces, chunk, *a.shape[3:])
    a = jnp.moveaxis(a, 2, 0)
    return a.reshape(*a.shape[:2], -1, *a.shape[4:])

  out = lax.map(lambda some: f(*some), tuple(map(cut, arrays)))
  out = out.reshape(*out.shape[:3], devices, chunk, -1)
  out = jnp.moveaxis(out, 0, 3)  # [B, L, devices, pieces, chunk, N]
  out = out.reshape(*out.shape[:3], pieces * chunk, -1)[:, :, :, :here]
  return out.reshape(*out.shape[:2], tokens, -1)


def _by_block(q, keys, chosen, positions, block, window):
  """`(out, cost, rows)`: each device sorts the choices of its own queries."""

  def here(q, k, v, chosen, marks, axis):
    run = functools.partial(_sorted_by_block, block=block, window=window)
    keys = Keys(k, v, marks.kv_pos)
    out, cost, rows = run(q, keys, chosen, marks.q_pos, axis=axis)
    return out, jax.tree.map(lambda a: a.reshape(1, 1, 1), (cost, rows))

  marks = Marks(positions, keys.pos)
  arrays = jnp.swapaxes(q, 1, 2), keys.k, keys.v, chosen
  out, told = over_heads(here, *arrays, marks, block=block)
  return jnp.swapaxes(out, 1, 2), *jax.tree.map(jnp.sum, told)


def _sorted_by_block(q, keys, chosen, positions, block, window, axis):
  """`(out [B, H, T, D], cost, rows)`: a key head is a row of the batch."""
  batch, heads, tokens, width = q.shape
  (groups, size), (lists, most) = keys.k.shape[1:3], chosen.shape[1::2]
  share, total = lists // groups, batch * groups
  blocks = -(-size // block) * (1 if axis is None else lax.axis_size(axis))
  fold = lambda a: a.reshape(total, share * tokens, *a.shape[4:])
  asked = q.reshape(batch, groups, share, heads // lists, tokens, width)
  asked = fold(jnp.moveaxis(asked, 4, 3))  # [BG, X, R, D]
  wanted = fold(chosen.reshape(batch, groups, share, tokens, most))
  place = positions[:, None, None]
  place = fold(jnp.broadcast_to(place, (batch, groups, share, tokens)))
  pos = keys.pos
  pos = jnp.broadcast_to(pos, (batch, groups, size)).reshape(total, 1, size)
  single = lambda a: a.reshape(total, 1, size, -1)
  folded = Keys(single(keys.k), single(keys.v), pos)

  choices = wanted.shape[1] * most
  tall = _power(choices // (2 * blocks), ROWS)
  layout = jax.vmap(lambda wanted: _layout(wanted, blocks, tall))
  choice, slot, index, count = layout(wanted)
  repeat = lambda a: jnp.repeat(a, most, axis=1)
  at = jnp.where(choice >= 0, _take(repeat(place), choice), -1)
  named = BlockLists(index[:, None, :, None], count[:, None], None, tall, block)
  asked = _moved(repeat(asked), choice, slot)
  how = {"window": window, "axis": axis}
  found, cost = attend_blocks(asked, folded, named, at, **how)
  apart = lambda a: jnp.moveaxis(a.reshape(*wanted.shape, *a.shape[2:]), 2, 0)
  outs, lses = (apart(_moved(a, slot, choice)) for a in found[:2])
  missing = jnp.moveaxis(wanted < 0, 2, 0)[..., None]
  out, _ = merge_lse(outs, jnp.where(missing, -jnp.inf, lses))
  out = out.reshape(batch, groups, share, tokens, heads // lists, -1)
  out = jnp.moveaxis(out, 3, 4).reshape(batch, heads, tokens, -1)
  return out, cost, cost.items * tall


def _layout(chosen, blocks, tall):
  """Tiles of one block each, from the choices i32[X, N] of one key head.

  Returns:
    `(choice i32[U], slot i32[X N], index i32[Q], count i32[Q])`: the choice in
    each row and the row of each choice, -1 for none; the block of each tile;
    and whether there is one.
  """
  plan = dispatch(chosen, jnp.zeros(chosen.shape, jnp.float32), blocks)
  tiles = -(-plan.sizes // tall)
  ends = jnp.cumsum(tiles)
  most = min((chosen.size + blocks * (tall - 1)) // tall, chosen.size)
  shift = (ends - tiles) * tall - (jnp.cumsum(plan.sizes) - plan.sizes)
  slot = jnp.where(chosen >= 0, plan.place + shift[chosen], -1).reshape(-1)
  to = jnp.where(slot >= 0, slot, most * tall)
  choice = jnp.full(most * tall, -1, jnp.int32)
  choice = choice.at[to].set(jnp.arange(slot.size), mode="drop")
  begins = jnp.zeros(most + 1, jnp.int32).at[ends[:-1]].add(1)
  index = jnp.cumsum(begins[:most], dtype=jnp.int32)
  count = (jnp.arange(most) < ends[-1]).astype(jnp.int32)
  return choice, slot, index, count


@jax.custom_vjp
def _moved(a, to, back):
  """Rows `to` i32[B, M] of a [B, N, ...]; 0 for -1.

  `back` i32[B, N] is where each went, so the gradient is gathered, too, and not
  scattered.
  """
  del back
  return _take(a, to)


_moved.defvjp(
  lambda a, to, back: (_take(a, to), back),
  lambda back, g: (_take(g, back), None, None),
)


def _take(a, at):
  row = jnp.arange(len(a))[:, None]
  found = a.at[row, jnp.maximum(at, 0)].get(mode="promise_in_bounds")
  shape = (*at.shape, *[1] * (a.ndim - 2))
  return jnp.where((at >= 0).reshape(shape), found, 0)


def _power(wanted: int, most: int) -> int:
  """The power of two up to `wanted`, within LEAST and what covers `most`."""
  up = 1 << max(most - 1, 0).bit_length()
  return min(max(LEAST, 1 << max(wanted, 1).bit_length() - 1), up)
