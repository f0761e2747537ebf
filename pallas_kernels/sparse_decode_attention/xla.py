# SPDX-License-Identifier: Apache-2.0
"""Sparse decode attention in plain XLA: gather what is listed, one softmax.

It is bound by memory, so what is gathered is kept small: some megabytes at a
time, whose place is used again (a large fresh buffer costs more than the gather
itself), first of keys for all scores, then of values.  Scores of the few
queries are small.  The whole cache, where it is contiguous and not quantised,
is read in place.

Axes: as in `ops`; n heads that are gathered (G, or H where query heads have
lists), m queries that share one (H / n * T), M pieces of g slots.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.types import (
  NEVER,
  Attended,
  Marks,
  Rule,
)
from pallas_kernels.sparse_decode_attention.pieces import (
  Pieces,
  everything,
  length,
  locate,
  read,
  seen,
)
from pallas_kernels.sparse_decode_attention.types import Units

CHUNK_BYTES = 4 << 20
"""Of keys, in f32, that are gathered at a time."""
LEAST_SLOTS = 16
"""Of a head, that are gathered at a time."""


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  units: Units | None,
  marks: Marks,
  rule: Rule,
  *,
  page_table: jax.Array | None,
  k_scale: jax.Array | None,
  v_scale: jax.Array | None,
  mass: bool,
  in_place: bool = True,
) -> Attended:
  """Arguments as in `ops`.

  Args:
    in_place: a whole cache need not be copied, even in parts; such a cache has
      no safe gradient: 0 times what nobody sees is NaN, if that is.
  """
  batch, heads, _, width = q.shape
  slots = length(k, page_table)
  whole = units is None
  gathered = max(k.shape[1], 1 if whole else units.index.shape[1])
  most = max(CHUNK_BYTES // (4 * batch * gathered * width), LEAST_SLOTS)
  if whole:
    units = everything(k, page_table, most)

  def in_chunks():
    pieces = locate(units, k, page_table, batch)
    count, size = pieces.slot.shape[2:]
    each = max(min(most // size, count), 1)
    got = _attend(
      q, k, v, pieces, each, marks, rule, k_scale, v_scale, slots, gathered
    )
    of_slot = got.mass
    if not mass or of_slot is None:
      return got._replace(mass=None)
    if whole:  # the last piece begins early where it would end too late
      tail = slots - (count - 1) * size
      parts = of_slot[..., : -size or None], of_slot[..., -tail:]
      return got._replace(mass=jnp.concatenate(parts, axis=-1))
    entries = units.index.shape[2]
    of_unit = of_slot.reshape(batch, heads, entries, -1).sum(-1)
    return got._replace(mass=of_unit)

  floats = jnp.issubdtype(k.dtype, jnp.floating)
  if not (whole and in_place and floats) or page_table is not None:
    return in_chunks()
  return _attend_all(q, k, v, marks, rule, mass, min(most, slots))


def _attend_all(q, k, v, marks, rule, mass, each) -> Attended:
  """The whole cache, read in place; `each` slots where that cannot be."""
  batch, heads, queries, _ = q.shape
  slots = k.shape[2]
  units = everything(k, None, slots)
  visible, bias = seen(
    locate(units, k, None, batch), marks, rule, queries, slots
  )
  stacked = q.reshape(batch, k.shape[1], -1, q.shape[3])
  weights, lse = _weigh(
    _products(stacked, k), q.shape, visible, bias, marks.sinks, rule
  )

  some = jnp.broadcast_to(visible.any(2), k.shape[:3])

  def without_unseen(v):
    def add(i, total):
      begin = jnp.minimum(i * each, slots - each)
      part = lambda a, axis: lax.dynamic_slice_in_dim(a, begin, each, axis)
      fresh = part(some, 2) & (begin + jnp.arange(each) >= i * each)
      clean = jnp.where(fresh[..., None], part(v, 2), 0)
      return total + _sums(part(weights, 3), clean)

    return lax.fori_loop(0, -(-slots // each), add, jnp.zeros_like(out))

  # Weights of 0 do not undo a NaN: where one came through, leave it out.
  out = _sums(weights, v)
  out = lax.cond(jnp.isfinite(out).all(), lambda _: out, without_unseen, v)
  out = out.reshape(*q.shape[:3], -1).astype(q.dtype)
  given = weights.reshape(batch, heads, queries, -1)
  return Attended(out, lse, _mass(given) if mass else None)


def _attend(
  q, k, v, pieces, each, marks, rule, k_scale, v_scale, slots, gathered
) -> Attended:
  """The listed pieces, `each` at a time; the mass is of slots."""
  batch, heads, queries, _ = q.shape
  count, size = pieces.slot.shape[2:]
  pieces = _padded(pieces, -count % each)
  visible, bias = seen(pieces, marks, rule, queries, slots)
  chunks = _split(pieces, each)
  rounds = len(chunks.start)
  # What no query sees is 0, so that 0 times it is 0.
  some = visible.any(2).reshape(batch, -1, rounds, each * size)
  some = jnp.moveaxis(some, 2, 0)[..., None]
  stacked = q.reshape(batch, gathered, -1, q.shape[3])

  def clean(a, scale, chunk, some):
    a = read(a, chunk, gathered)
    if scale is not None:
      a = a.astype(jnp.float32) * read(scale, chunk, gathered)[..., None]
    return jnp.where(some, a, 0).astype(q.dtype)

  def score(x):
    return _products(stacked, clean(k, k_scale, *x))

  def add(total, x):
    weights, *x = x
    return total + _sums(weights, clean(v, v_scale, *x)), None

  if rounds == 1:
    only = jax.tree.map(lambda a: a[0], (chunks, some))
    weights, lse = _weigh(
      score(only), q.shape, visible, bias, marks.sinks, rule
    )
    out = _sums(weights, clean(v, v_scale, *only))
  else:
    scores = jnp.moveaxis(lax.map(score, (chunks, some)), 0, 3)
    scores = scores.reshape(*scores.shape[:3], -1)
    weights, lse = _weigh(scores, q.shape, visible, bias, marks.sinks, rule)
    parts = weights.reshape(*weights.shape[:3], rounds, -1)
    parts = jnp.moveaxis(parts, 3, 0)
    zeros = jnp.zeros((*stacked.shape[:3], v.shape[3]), jnp.float32)
    out, _ = lax.scan(add, zeros, (parts, chunks, some))
  out = out.reshape(*q.shape[:3], -1).astype(q.dtype)
  weights = weights.reshape(batch, heads, queries, -1)[..., : count * size]
  return Attended(out, lse, _mass(weights))


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
  """Products q k^T, f32[B, n, m, keys]."""
  return jnp.einsum("bnmd,bnkd->bnmk", q, k, preferred_element_type=jnp.float32)


def _sums(weights: jax.Array, v: jax.Array) -> jax.Array:
  """Values by weight, f32[B, n, m, E]."""
  return jnp.einsum(
    "bnmk,bnke->bnme",
    weights.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )


def _weigh(scores, shape, visible, bias, sinks, rule):
  """Softmax of scores f32[B, n, m, keys]; an empty row gives 0 and -inf.

  Returns:
    Weights like the scores, and the lse f32[B, H, T].
  """
  batch, heads, queries, width = shape
  gathered, keys = scores.shape[1], scores.shape[3]
  scores = scores * (width**-0.5 if rule.scale is None else rule.scale)
  if rule.softcap is not None:
    scores = rule.softcap * jnp.tanh(scores / rule.softcap)
  split = (batch, gathered, heads // gathered, queries)
  scores = scores.reshape(*split, keys)
  if bias is not None:
    scores = scores + bias[:, :, None, None]
  visible = visible[:, :, None]
  scores = jnp.where(visible, scores, NEVER)
  top = jnp.maximum(scores.max(-1), NEVER)
  sink = None
  if sinks is not None:
    sink = sinks.reshape(1, gathered, -1, 1)
    top = jnp.maximum(top, sink)
  top = lax.stop_gradient(top)
  weights = jnp.where(visible, jnp.exp(scores - top[..., None]), 0)
  total = weights.sum(-1)
  if sink is not None:
    total = total + jnp.exp(sink - top)
  empty = total == 0
  safe = jnp.where(empty, 1, total)
  weights = weights / safe[..., None]
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(safe))
  return (
    weights.reshape(batch, gathered, -1, keys),
    lse.reshape(batch, heads, queries),
  )


def _mass(weights: jax.Array) -> jax.Array:
  return lax.stop_gradient(weights).sum(2)


def _padded(pieces: Pieces, more: int) -> Pieces:
  """With pieces at the end that are not live."""
  if not more:
    return pieces
  pad = lambda a: jnp.pad(
    a, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (a.ndim - 3)
  )
  return Pieces(*map(pad, pieces))


def _split(pieces: Pieces, each: int) -> Pieces:
  """Leading axis: rounds of `each` pieces."""

  def split(a):
    shape = (*a.shape[:2], -1, each, *a.shape[3:])
    return jnp.moveaxis(a.reshape(shape), 2, 0)

  return Pieces(*map(split, pieces))
