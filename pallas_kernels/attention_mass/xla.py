# SPDX-License-Identifier: Apache-2.0
"""Attention mass in plain XLA: tiles of the matrix of all pairs, one by one.

Legal, and meant, on every platform: each tile is one matrix product and one
exp, which XLA does well; there is no kernel of our own.

Axes: as in `ops`; R queries and C keys of a tile, r heads that share a key.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.types import NEVER, Marks, Rule

SCORES = 1 << 22
"""Of a tile, in all heads and rows."""
MOST_QUERIES = 256
"""Of a tile."""
LEAST_KEYS = 128
"""Of a tile, if there are as many."""


class _Queries(NamedTuple):
  """A tile of queries: [B, H, R, ...] or [B, R]."""

  q: jax.Array
  pos: jax.Array
  segment: jax.Array | None
  lse: jax.Array | None
  weight: jax.Array | None


class _Keys(NamedTuple):
  """All keys, of which chunks are taken: [B, P, S, ...]."""

  k: jax.Array
  pos: jax.Array
  segment: jax.Array | None
  bias: jax.Array | None

  def chunk(self, n: jax.Array | int, size: int) -> "_Keys":
    """Keys n * size and so on."""
    take = lambda a: lax.dynamic_slice_in_dim(a, n * size, size, axis=2)
    return jax.tree.map(take, self)


def forward(
  q: jax.Array,
  k: jax.Array,
  lse: jax.Array | None,
  marks: Marks,
  rule: Rule,
  *,
  reduce: Callable[[jax.Array, jax.Array], jax.Array],
  block: int,
  block_q: int | None,
  q_weight: jax.Array | None,
) -> jax.Array:
  """Arguments as in `ops`; `reduce` is jnp.add or jnp.maximum."""
  (batch, heads, queries, _), keys = q.shape, k.shape[2]
  if block_q is None:
    rows = min(queries, MOST_QUERIES)
  else:
    rows = min(
      block_q * max(MOST_QUERIES // block_q, 1),
      -(-queries // block_q) * block_q,
    )
  most = max(SCORES // (batch * heads * rows), LEAST_KEYS)
  size = -(-min(keys, most) // block) * block
  tile = _tiles(q, lse, marks, q_weight, rows)
  chunks = -(-keys // size)
  look = functools.partial(
    _look,
    marks.sinks,
    rule,
    block,
    _keys(k, marks, chunks * size),
    size,
    chunks,
  )
  height = block_q or rows
  over_queries = jnp.sum if reduce is jnp.add else jnp.max

  def reduced(tile):
    """f32[B, H, rows / height, blocks] of a tile."""
    of_query = lambda got: over_queries(
      got.reshape(*got.shape[:2], -1, height, got.shape[3]), axis=3
    )
    got = look(tile, of_query)
    return got.reshape(*got.shape[:3], -1)[..., : -(-keys // block)]

  if block_q is not None:
    each = jnp.moveaxis(lax.map(reduced, tile), 0, 2)
    return each.reshape(batch, heads, -1, each.shape[4])[
      :, :, : -(-queries // block_q)
    ]
  zeros = jnp.zeros((batch, heads, -(-keys // block)), jnp.float32)
  add = lambda total, tile: (reduce(total, reduced(tile)[:, :, 0]), None)
  return lax.scan(add, zeros, tile)[0]


def _look(sinks, rule, block, keys, size, chunks, tile, of_query):
  """`of_query` of what each query of a tile gives each block, chunk by chunk.

  Args:
    of_query: f32[B, H, R, C / block] -> f32[B, H, n, C / block].

  Returns:
    f32[B, H, n, chunks, C / block].
  """
  heads = tile.q.shape[1]

  def weigh(scores, visible, lse):
    safe = jnp.where(lse == -jnp.inf, 0, lse)
    weights = jnp.where(visible, jnp.exp(scores - safe[..., None]), 0)
    if tile.weight is not None:
      weights = weights * _split(tile.weight, scores.shape[1])[..., None]
    shape = (len(weights), heads, weights.shape[3], -1, block)
    return of_query(weights.reshape(shape).sum(-1))

  def total(scores, visible):
    """Top of the scores, and the sum of exp of what they are below it."""
    top = scores.max(-1)
    return top, jnp.where(visible, jnp.exp(scores - top[..., None]), 0).sum(-1)

  def closed(top, sum_):
    if sinks is not None:
      sink = sinks.reshape(1, keys.k.shape[1], -1, 1)
      high = jnp.maximum(top, sink)
      sum_ = sum_ * jnp.exp(top - high) + jnp.exp(sink - high)
      top = high
    empty = sum_ == 0
    return jnp.where(empty, -jnp.inf, top + jnp.log(jnp.where(empty, 1, sum_)))

  lse = None if tile.lse is None else _split(tile.lse, keys.k.shape[1])
  if chunks == 1:
    scores, visible = _scores(tile, keys, rule)
    if lse is None:
      lse = closed(*total(scores, visible))
    return weigh(scores, visible, lse)[:, :, :, None]

  def seldom(n, f, otherwise):
    """`f` of chunk n, where anything in it is visible."""
    chunk = keys.chunk(n, size)
    visible = _visible(tile, chunk, rule)
    run = lambda: f(*_scores(tile, chunk, rule))
    return lax.cond(visible.any(), run, lambda: otherwise)

  if lse is None:
    groups = keys.k.shape[1]
    shape = (len(tile.q), groups, heads // groups, tile.q.shape[2])
    start = jnp.full(shape, NEVER), jnp.zeros(shape)

    def add(state, n):
      top, sum_ = seldom(n, total, start)
      high = jnp.maximum(state[0], top)
      sum_ = sum_ * jnp.exp(top - high) + state[1] * jnp.exp(state[0] - high)
      return (high, sum_), None

    lse = closed(*lax.scan(add, start, jnp.arange(chunks))[0])
  give = lambda scores, visible: weigh(scores, visible, lse)
  none = jax.eval_shape(lambda: give(*_scores(tile, keys.chunk(0, size), rule)))
  zeros = jnp.zeros(none.shape, none.dtype)
  got = lax.map(lambda n: seldom(n, give, zeros), jnp.arange(chunks))
  return jnp.moveaxis(got, 0, 3)


def _visible(tile: _Queries, keys: _Keys, rule: Rule) -> jax.Array:
  """bool[B, 1 or G, 1, R, C]."""
  at, pos = tile.pos[:, None, None, :, None], keys.pos[:, :, None, None]
  visible = (at >= 0) & (pos >= 0)
  if rule.causal:
    visible &= pos <= at
  if rule.window is not None:
    visible &= pos > at - rule.window
  if tile.segment is not None and keys.segment is not None:
    own = tile.segment[:, None, None, :, None]
    visible &= keys.segment[:, :, None, None] == own
  if tile.weight is not None:
    given = (tile.weight > 0).any(1)[:, None, None, :, None]
    visible = visible if tile.lse is None else visible & given
  return visible


def _scores(tile, keys, rule) -> tuple[jax.Array, jax.Array]:
  """f32[B, G, r, R, C], NEVER where not visible, and where it is."""
  groups, width = keys.k.shape[1], tile.q.shape[3]
  scores = jnp.einsum(
    "bgrtd,bgsd->bgrts",
    _split(tile.q, groups),
    keys.k,
    preferred_element_type=jnp.float32,
  )
  scores = scores * (width**-0.5 if rule.scale is None else rule.scale)
  if rule.softcap is not None:
    scores = rule.softcap * jnp.tanh(scores / rule.softcap)
  if keys.bias is not None:
    scores = scores + keys.bias[:, :, None, None]
  visible = _visible(tile, keys, rule)
  return jnp.where(visible, scores, NEVER), visible


def _split(a: jax.Array, groups: int) -> jax.Array:
  """[B, H or 1, ...] as [B, G, r, ...], or [B, 1, 1, ...]."""
  groups = min(groups, a.shape[1])
  return a.reshape(len(a), groups, -1, *a.shape[2:])


def _tiles(q, lse, marks, q_weight, rows) -> _Queries:
  """Leading axis: tiles; what is added at the end has the position -1."""
  batch, _, queries, _ = q.shape
  count = -(-queries // rows)
  pos = marks.q_pos
  if pos is None:
    pos = jnp.broadcast_to(jnp.arange(queries), (batch, queries))

  def cut(a, axis, fill=0):
    pads = [(0, 0)] * a.ndim
    pads[axis] = (0, count * rows - queries)
    a = jnp.pad(a, pads, constant_values=fill)
    shape = (*a.shape[:axis], count, rows, *a.shape[axis + 1 :])
    return jnp.moveaxis(a.reshape(shape), axis, 0)

  return _Queries(
    cut(q, 2),
    cut(pos, 1, -1),
    None if marks.q_segment is None else cut(marks.q_segment, 1),
    None if lse is None else cut(lse, 2),
    None if q_weight is None else cut(q_weight, 2),
  )


def _keys(k: jax.Array, marks: Marks, padded: int) -> _Keys:
  """What is added at the end has the position -1."""
  keys = k.shape[2]
  pos = marks.kv_pos
  if pos is None:
    pos = jnp.arange(keys)[None, None]

  def pad(a, fill=0):
    pads = [(0, 0), (0, 0), (0, padded - keys)] + [(0, 0)] * (a.ndim - 3)
    return jnp.pad(a, pads, constant_values=fill)

  segment, bias = marks.kv_segment, marks.kv_bias
  return _Keys(
    pad(k),
    pad(pos, -1),
    None if segment is None else pad(segment[:, None]),
    None if bias is None else pad(bias),
  )
