# SPDX-License-Identifier: Apache-2.0
"""The public attention mass: checks."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention_mass import xla
from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  Marks,
  Rule,
)

REDUCTIONS = ("sum", "max")


def attention_mass(
  q: jax.Array,
  k: jax.Array,
  *,
  lse: jax.Array | None = None,
  marks: Marks = UNMARKED,
  rule: Rule = CAUSAL,
  reduce_q: str = "sum",
  block: int = 1,
  block_q: int | None = None,
  q_weight: jax.Array | None = None,
) -> jax.Array:
  """Attention that each key, or block of keys, gets from the queries.

  A block gets exp(score - lse) of its keys, added up, from each query; of that
  the sum or the maximum over queries is returned.  The matrix of all pairs is
  never there: memory is that of a tile of it, besides arguments and result.
  Tiles in which nothing is visible are skipped.  It carries no gradient.

  Axes: B batch, H query heads, G key heads, T queries, S keys, D head width,
  Q tiles of queries, K blocks of keys.

  Args:
    q: queries, [B, H, T, D].
    k: keys, [B, G, S, D].
    lse: log of the sum of exp of each query's scores, as attention returns it,
      f32[B, H, T]; computed if None, by one more pass where the keys are many.
    marks, rule: as in block-sparse attention.
    reduce_q: "sum" or "max" over queries (static).
    block: keys in a block (static); the last one may be cut off.
    block_q: queries in a tile (static); all of them are one if None.
    q_weight: what each query's attention is times, f32[B, T] or [B, H, T]; at
      least 0, of which 0 leaves a query out.

  Returns:
    f32[B, H, K], or f32[B, H, Q, K] with `block_q`.

  Raises:
    ValueError: shapes do not fit together, or no such reduction.
  """
  _check(q, k, lse, marks, reduce_q, block, block_q, q_weight)
  if q_weight is not None and q_weight.ndim == 2:
    q_weight = q_weight[:, None]
  return xla.forward(
    lax.stop_gradient(q),
    lax.stop_gradient(k),
    lax.stop_gradient(lse),
    lax.stop_gradient(marks),
    rule,
    reduce=jnp.add if reduce_q == "sum" else jnp.maximum,
    block=block,
    block_q=block_q,
    q_weight=lax.stop_gradient(q_weight),
  )


def _check(q, k, lse, marks, reduce_q, block, block_q, q_weight):
  """Raises where shapes do not fit together."""
  if reduce_q not in REDUCTIONS:
    raise ValueError(f"{reduce_q=} is none of {REDUCTIONS}.")
  if block < 1 or (block_q is not None and block_q < 1):
    raise ValueError(f"blocks have a size: {block=}, {block_q=}.")
  fits = q.ndim == k.ndim == 4 and (len(q), q.shape[3]) == (len(k), k.shape[3])
  if not fits or q.shape[1] % k.shape[1]:
    raise ValueError(
      "q is [B, H, T, D] and k [B, G, S, D], G a divisor of H; got shapes"
      f" {q.shape} and {k.shape}."
    )
  (batch, heads, queries, _), (_, groups, keys, _) = q.shape, k.shape
  of_head = {(batch, 1, keys), (batch, groups, keys)}
  expected = {
    "lse": (lse, {(batch, heads, queries)}),
    "q_weight": (q_weight, {(batch, queries), (batch, heads, queries)}),
    "marks.q_pos": (marks.q_pos, {(batch, queries)}),
    "marks.kv_pos": (marks.kv_pos, of_head),
    "marks.q_segment": (marks.q_segment, {(batch, queries)}),
    "marks.kv_segment": (marks.kv_segment, {(batch, keys)}),
    "marks.kv_bias": (marks.kv_bias, of_head),
    "marks.sinks": (marks.sinks, {(heads,)}),
  }
  for name, (a, shapes) in expected.items():
    if a is not None and a.shape not in shapes:
      raise ValueError(
        f"{name} is of shape {' or '.join(map(str, sorted(shapes)))}; got"
        f" {a.shape}."
      )
  if (marks.q_segment is None) != (marks.kv_segment is None):
    raise ValueError("give both marks.q_segment and marks.kv_segment, or none.")
