# SPDX-License-Identifier: Apache-2.0
"""How much attention keys get: the signal of methods that choose among keys.

Axes: B batch, T queries, S keys, H query heads, D head width, L lists of heads,
Q tiles of queries, K blocks of keys.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.cost import Cost
from pallas_kernels import attention_mass as kernel
from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  Marks,
  Rule,
)

REDUCTIONS = ("mean", "max", "sum")
"""How scores of query heads become those of the list that they share."""


def attention_mass(
  q: Float[Array, "B T H D"],
  keys: Keys,
  positions: Int[Array, "B T"],
  *,
  lse: Float[Array, "B H T"] | None = None,
  rule: Rule = CAUSAL,
  marks: Marks = UNMARKED,
  reduce_q: str = "sum",
  block: int = 1,
  block_q: int | None = None,
  q_weight: Float[Array, "B ..."] | None = None,
) -> tuple[Float[Array, "B H ..."], Cost]:
  """Attention that each key, or block of keys, gets from the queries.

  In memory of a tile of the T x S pairs; see
  `pallas_kernels.attention_mass.attention_mass`.  It carries no gradient.

  Args:
    q: queries, often only the last few.
    keys: the keys, in any order; their values are not read.
    positions: of the queries, -1 for none.
    lse: as the attention of these queries returned it; computed if None.
    rule: scale, window and so on (static).
    marks: segments, bias and sinks, if any; positions are those given.
    reduce_q: "sum" or "max" over queries (static).
    block: keys in a block (static).
    block_q: queries in a tile (static); all are one if None.
    q_weight: what each query counts, f32[B, T] or [B, H, T]; 1 if None.

  Returns:
    f32[B, H, K] or f32[B, H, Q, K], and what it took: the products of queries
    and keys, all of them, once (twice where the lse takes a pass of its own).
  """
  mass = kernel.attention_mass(
    jnp.moveaxis(q, 2, 1),
    keys.k,
    lse=lse,
    marks=marks._replace(q_pos=positions, kv_pos=keys.pos),
    rule=rule,
    reduce_q=reduce_q,
    block=block,
    block_q=block_q,
    q_weight=q_weight,
  )
  batch, queries, heads, width = q.shape
  pairs = batch * heads * queries * keys.k.shape[2]
  return mass, Cost.dense(2.0 * pairs * width, batch * queries)


def check_reduction(how: str) -> None:
  """Raises ValueError unless it is one of `REDUCTIONS`."""
  if how not in REDUCTIONS:
    raise ValueError(f"group_reduce={how!r} must be mean, max or sum.")


def group_reduce(
  scores: Float[Array, "B H ..."],
  lists: int,
  how: str = "mean",
  axis_name: str | None = None,
) -> Float[Array, "B L ..."]:
  """Scores of query heads as scores of the lists that they share.

  Which reduction is meant differs between papers, so it is always said:
  kvpress averages a group, SnapKV keeps query heads, DELTA takes the maximum
  over all heads, TokenSelect their sum.

  Args:
    scores: of each query head; head h belongs to list h // (H / L).
    lists: L (static): 1, the key heads, or H.
    how: "mean", "max" or "sum" (static).
    axis_name: mesh axis over which heads are sharded in `jax.shard_map`: the
      one list is then that of all heads of all devices.

  Raises:
    ValueError: no such reduction, L does not divide H, or several lists over
      sharded heads, which would mix those of different devices.
  """
  heads = scores.shape[1]
  check_reduction(how)
  if lists < 1 or heads % lists:
    raise ValueError(f"{heads} heads do not share {lists} lists.")
  if axis_name is not None and lists != 1:
    raise ValueError(
      f"over {axis_name=} all heads share one list; got {lists=}: leave"
      " `axis_name` out if no list is shared between devices."
    )
  shape = (len(scores), lists, heads // lists, *scores.shape[2:])
  reduced = getattr(jnp, how)(scores.reshape(shape), axis=2)
  if axis_name is None:
    return reduced
  over = {"mean": lax.pmean, "max": lax.pmax, "sum": lax.psum}[how]
  return over(reduced, axis_name)
