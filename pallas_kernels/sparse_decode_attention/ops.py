# SPDX-License-Identifier: Apache-2.0
"""The public sparse decode attention: checks and derivatives."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  Attended,
  Marks,
  Rule,
)
from pallas_kernels.sparse_decode_attention import tpu, tuned, xla
from pallas_kernels.sparse_decode_attention.pieces import length
from pallas_kernels.sparse_decode_attention.types import Units
from pallas_kernels.varying import alike

MOST_QUERIES = 16


def sparse_decode_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  units: Units | None,
  marks: Marks = UNMARKED,
  rule: Rule = CAUSAL,
  *,
  page_table: jax.Array | None = None,
  k_scale: jax.Array | None = None,
  v_scale: jax.Array | None = None,
  mass: bool = False,
) -> Attended:
  """Softmax attention of up to 16 queries a row over the listed keys they see.

  Cost follows the lists: nothing else of the cache is read, so NaN there
  reaches nothing, nor does what is listed and seen by no query.  A query that
  sees no key gives 0.

  Differentiable in q, k, v, kv_bias, sinks and the scales, once and in reverse;
  the gradient of a cache is as large as the cache.

  On TPU a kernel of ours runs where pages are whole tiles of memory (`tuned`),
  else, as for single tokens, and on other platforms, gathers of XLA.

  Axes: B batch, H query heads, G key heads (a divisor of H), T queries, S slots
  of a sequence, D and E head widths, N pages of a pool, L heads that own a
  list, K entries of a list.

  Args:
    q: queries, [B, H, T, D]; T is at most 16.
    k: keys, [B, G, S, D]; with `page_table`, [N, G, page, D].
    v: values, [B, G, S, E]; with `page_table`, [N, G, page, E].
    units: what is looked at (dynamic); the whole cache if None.
    marks: as in block-sparse attention, by slot of the sequence; but if `q_pos`
      is None, the queries are at the last T of S positions.
    rule: as in block-sparse attention (static).
    page_table: pages of each row, i32[B, S / page], -1 for none (dynamic).  A
      unit must then be whole pages, or a page whole units.
    k_scale: what int8 keys are times, f32, of the shape of k without D.
    v_scale: what int8 values are times, f32, of the shape of v without E.
    mass: return the attention that each listed unit got, added up over the
      queries, f32[B, H, K]; of each slot, f32[B, H, S], if `units` is None.

  Raises:
    ValueError: shapes or dtypes do not fit together.
  """
  _check(q, k, v, units, marks, page_table, k_scale, v_scale)
  moving = q, k, v, marks.kv_bias, marks.sinks, k_scale, v_scale
  still = units, marks._replace(kv_bias=None, sinks=None), page_table
  return _attention((rule, mass), *alike((moving, still)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config, moving, still):
  q, k, v, *_ = moving
  units, _, page_table = still
  fits = tuned.blocks(q, k, v, units, page_table) is not None
  plain = functools.partial(_forward, xla.forward, config)
  if not fits:
    return plain(moving, still)
  kernel = functools.partial(_forward, tpu.forward, config)
  return lax.platform_dependent(moving, still, tpu=kernel, default=plain)


def _forward(implementation, config, moving, still, **how):
  (rule, mass), (units, marks, page_table) = config, still
  q, k, v, kv_bias, sinks, k_scale, v_scale = moving
  marks = marks._replace(kv_bias=kv_bias, sinks=sinks)
  return implementation(
    q,
    k,
    v,
    units,
    marks,
    rule,
    page_table=page_table,
    k_scale=k_scale,
    v_scale=v_scale,
    mass=mass,
    **how,
  )


def _keep(config, moving, still):
  return _attention(config, moving, still), (moving, still)


def _backward(config, kept, cotangents):
  """That of the XLA form: what was gathered is gathered once more."""
  moving, still = kept
  f = lambda moving: _forward(
    xla.forward, config, moving, still, in_place=False
  )
  _, pull = jax.vjp(f, moving)
  return *pull(cotangents), None


_attention.defvjp(_keep, _backward)


def _check(q, k, v, units, marks, page_table, k_scale, v_scale):
  """Raises where shapes and dtypes do not fit together."""
  if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
    raise ValueError(
      "q is [B, H, T, D], k and v [B, G, S, D] or [N, G, page, D]; got shapes"
      f" {q.shape}, {k.shape} and {v.shape}."
    )
  batch, heads, queries, width = q.shape
  if queries > MOST_QUERIES:
    raise ValueError(
      f"{queries} queries in a row, and decode takes up to {MOST_QUERIES}: use"
      " `block_sparse_attention`."
    )
  if k.shape[:3] != v.shape[:3] or k.shape[3] != width:
    raise ValueError(
      f"k{k.shape} and v{v.shape} must agree but in the last axis, and k with"
      f" q{q.shape} there."
    )
  if heads % k.shape[1]:
    raise ValueError(
      f"{heads} query heads do not share {k.shape[1]} key heads."
    )
  if page_table is None and len(k) != batch:
    raise ValueError(
      f"q has {batch} rows and the cache {len(k)}: give the `page_table` of a"
      " pool."
    )
  if page_table is not None and (
    page_table.ndim != 2 or len(page_table) not in (1, batch)
  ):
    raise ValueError(
      f"`page_table` is [{batch}, pages of a row]; got {page_table.shape}."
    )
  for name, a, scale in (("k", k, k_scale), ("v", v, v_scale)):
    if (scale is None) != jnp.issubdtype(a.dtype, jnp.floating):
      raise ValueError(
        f"{name} is {a.dtype}: `{name}_scale` belongs to integers, and only"
        " to them."
      )
    if scale is not None and scale.shape != a.shape[:3]:
      raise ValueError(
        f"`{name}_scale` is {a.shape[:3]}, as {name} without its last axis; got"
        f" {scale.shape}."
      )
  if units is not None:
    _check_units(units, q, k, page_table)
  _check_marks(marks, q, k, page_table)


def _check_units(units, q, k, page_table):
  (batch, heads, *_), groups = q.shape, k.shape[1]
  lead = units.index.shape[:2]
  if (
    units.index.ndim != 3
    or units.count.shape != lead
    or lead[0] not in (1, batch)
    or lead[1] not in (1, groups, heads)
  ):
    raise ValueError(
      f"units are index [B, L, K] and count [B, L], B = {batch} or 1 and L one"
      f" of {sorted({1, groups, heads})}; got {units.index.shape} and"
      f" {units.count.shape}."
    )
  page = k.shape[2]
  if units.unit < 1 or (
    page_table is not None and units.unit % page and page % units.unit
  ):
    raise ValueError(
      f"units of {units.unit} slots and pages of {page}: one must be a multiple"
      " of the other."
    )


def _check_marks(marks, q, k, page_table):
  (batch, heads, queries, _), groups = q.shape, k.shape[1]
  slots = length(k, page_table)
  of_head = {(batch, 1, slots), (batch, groups, slots)}
  fits = {
    "q_pos": {(batch, queries)},
    "kv_pos": of_head,
    "q_segment": {(batch, queries)},
    "kv_segment": {(batch, slots)},
    "kv_bias": of_head,
    "sinks": {(heads,)},
  }
  for name, shapes in fits.items():
    mark = getattr(marks, name)
    if mark is not None and mark.shape not in shapes:
      raise ValueError(
        f"marks.{name} is of shape {' or '.join(map(str, sorted(shapes)))}; got"
        f" {mark.shape}."
      )
  if (marks.q_segment is None) != (marks.kv_segment is None):
    raise ValueError("give both marks.q_segment and marks.kv_segment, or none.")
