# SPDX-License-Identifier: Apache-2.0
"""Attention under an ambient mesh: each device has rows, heads and query tiles.

Kernels cannot be sharded by the compiler, so attention over lists says itself
where its arrays lie: the batch over `data`, `fsdp` and `expert`, heads over
`model`, query tiles over `seq`.  Keys and values of a sequence are brought
together over `seq`, those of a device's heads only; lists stay where their
tiles are, so a device works for what its tiles look at.

Axes: as in `pallas_kernels.block_sparse_attention.types`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from adaptivejax.core.per_device import (
  BATCH_AXES,
  TOKEN_AXIS,
  WIDTH_AXIS,
  auto_axes,
  dividing,
)
from pallas_kernels.block_sparse_attention import BlockLists, Marks

Axes = tuple[str, ...]


def over_heads(
  attend: Callable[..., Any],
  q: Array,
  k: Array,
  v: Array,
  lists: BlockLists,
  marks: Marks,
) -> Any:
  """`attend(q, k, v, lists, marks)`, of each device its part.

  Args:
    attend: returns a pytree of arrays [B, H, T or Q, ...].
    q, k, v: [B, H, T, D], [B, G, S, D] and [B, G, S, E].
    lists, marks: `q_pos` must be given.
  """
  if not auto_axes():
    return attend(q, k, v, lists, marks)
  (rows, _, tokens, _), groups = q.shape, k.shape[1]
  batch, heads = dividing(BATCH_AXES, rows), dividing((WIDTH_AXIS,), groups)
  seq = dividing((TOKEN_AXIS,), tokens // lists.block_q)
  if tokens % lists.block_q:
    seq = ()

  def spec(a: Array | None, *axes: Axes) -> Any:
    """An axis of size 1 serves all."""
    if a is None:
      return None
    return P(*(x if x and n > 1 else None for n, x in zip(a.shape, axes)))

  def of_list(a: Array | None) -> Any:
    return spec(a, batch, heads, seq)

  in_specs = (
    spec(q, batch, heads, seq),
    spec(k, batch, heads),
    spec(v, batch, heads),
    BlockLists(
      of_list(lists.index),
      of_list(lists.count),
      of_list(lists.rows),
      lists.block_q,
      lists.block_kv,
    ),
    Marks(
      q_pos=spec(marks.q_pos, batch, seq),
      kv_pos=spec(marks.kv_pos, batch, heads),
      q_segment=spec(marks.q_segment, batch, seq),
      kv_segment=spec(marks.kv_segment, batch),
      kv_bias=spec(marks.kv_bias, batch, heads),
      sinks=spec(marks.sinks, heads),
    ),
  )
  out = P(batch or None, heads or None, seq or None)
  run = jax.shard_map(attend, in_specs=in_specs, out_specs=out)
  return run(q, k, v, lists, marks)
