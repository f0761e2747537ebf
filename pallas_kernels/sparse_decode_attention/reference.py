# SPDX-License-Identifier: Apache-2.0
"""The meaning of sparse decode attention: dense, with a mask of all pairs.

Axes: as in `ops`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  Attended,
  BlockLists,
  Marks,
  Rule,
)
from pallas_kernels.sparse_decode_attention.types import Units


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
  """Softmax attention of a few queries over all keys; arguments as in `ops`."""
  k, v = dequantised(k, k_scale, q), dequantised(v, v_scale, q)
  if page_table is not None:
    k, v = contiguous(k, page_table), contiguous(v, page_table)
    mapped = jnp.repeat(page_table >= 0, k.shape[2] // page_table.shape[1], 1)
    pos = marks.kv_pos
    if pos is None:
      pos = jnp.arange(k.shape[2])[None, None]
    marks = marks._replace(kv_pos=jnp.where(mapped[:, None], pos, -1))
  (batch, _, queries, _), slots = q.shape, k.shape[2]
  if marks.q_pos is None:
    last = jnp.arange(slots - queries, slots)
    marks = marks._replace(q_pos=jnp.broadcast_to(last, (batch, queries)))
  if units is None:
    index = jnp.arange(slots)[None, None]
    units = Units(index, jnp.full((1, 1), slots))
  lists = BlockLists(
    units.index[:, :, None],
    units.count[:, :, None],
    block_q=queries,
    block_kv=units.unit,
  )
  got = reference.block_sparse_attention(q, k, v, lists, marks, rule, mass=mass)
  return got._replace(mass=None if got.mass is None else got.mass[:, :, 0])


def dequantised(
  a: jax.Array, scale: jax.Array | None, q: jax.Array
) -> jax.Array:
  """What stands for `a`, of the dtype of the queries if it is quantised."""
  if scale is None:
    return a
  return (a.astype(jnp.float32) * scale[..., None]).astype(q.dtype)


def contiguous(pool: jax.Array, page_table: jax.Array) -> jax.Array:
  """The cache [B, G, S, D] whose pages are in a pool [N, G, page, D]."""
  pages = jnp.moveaxis(pool[jnp.maximum(page_table, 0)], 2, 1)
  batch, groups, count, page, width = pages.shape
  return pages.reshape(batch, groups, count * page, width)
