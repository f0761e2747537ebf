# SPDX-License-Identifier: Apache-2.0
"""Attention under an ambient mesh: each device has rows, heads and tokens.

Kernels cannot be sharded by the compiler, so attention says itself where its
arrays lie: the batch over `data`, `fsdp` and `expert`, heads over `model`,
queries with their lists over `seq`, and so do keys, which then go round in a
ring (`core.ring`).  A device works for what its own queries look at.

Where `seq` divides the queries but not the keys, as those of a cache may be,
keys of a device's heads are brought together instead.

Axes: as in `pallas_kernels.block_sparse_attention.types`.
"""

import functools
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
from pallas_kernels.block_sparse_attention import Marks

Axes = tuple[str, ...]


def over_heads(
  attend: Callable[..., Any],
  q: Array,
  k: Array,
  v: Array,
  lists: Any,
  marks: Marks,
  *,
  tile: int = 1,
  block: int = 1,
  ring: bool = True,
) -> Any:
  """`attend(q, k, v, lists, marks, axis=None)`, of each device its part.

  Args:
    attend: returns a pytree of arrays [B, H, T or Q, ...], where axes of size 1
      may stand for one number of each device.  With an `axis`, the keys that it
      is given are a shard of those over that mesh axis.
    q, k, v: [B, H, T, D], [B, G, S, D] and [B, G, S, E].
    lists: pytree of arrays [B, L, T or Q, ...].
    marks: positions must be given.
    tile, block: queries and keys that stay on one device (static).
    ring: whether `attend` takes a shard of the keys (static).

  Raises:
    ValueError: `seq` divides a sequence, but not its tiles and blocks.
  """
  mesh = auto_axes()
  if not mesh:
    return attend(q, k, v, lists, marks, axis=None)
  (rows, _, tokens, _), (_, groups, keys, _) = q.shape, k.shape
  batch, heads = dividing(BATCH_AXES, rows), dividing((WIDTH_AXIS,), groups)
  seq = _spread(tokens, tile)
  shards = _spread(keys, block) if ring and seq else ()
  if ring and not shards and is_ring(tokens, keys):
    _refuse(mesh[TOKEN_AXIS], tokens, tile, block)

  def spec(a: Array | None, *axes: Axes) -> Any:
    """An axis of size 1 serves all."""
    if a is None:
      return None
    return P(*(x if x and n > 1 else None for n, x in zip(a.shape, axes)))

  in_specs = (
    spec(q, batch, heads, seq),
    spec(k, batch, heads, shards),
    spec(v, batch, heads, shards),
    jax.tree.map(lambda a: spec(a, batch, heads, seq), lists),
    Marks(
      q_pos=spec(marks.q_pos, batch, seq),
      kv_pos=spec(marks.kv_pos, batch, heads, shards),
      q_segment=spec(marks.q_segment, batch, seq),
      kv_segment=spec(marks.kv_segment, batch, shards),
      kv_bias=spec(marks.kv_bias, batch, heads, shards),
      sinks=spec(marks.sinks, heads),
    ),
  )
  out = P(batch or None, heads or None, seq or None)
  attend = functools.partial(attend, axis=TOKEN_AXIS if shards else None)
  run = jax.shard_map(attend, in_specs=in_specs, out_specs=out)
  return run(q, k, v, lists, marks)


def is_ring(queries: int, keys: int) -> bool:
  """Whether a sequence that looks at itself lies over the mesh axis `seq`."""
  return queries == keys and bool(_spread(queries, 1))


def tokens_here(tokens: int) -> int:
  """How many of the tokens of a sequence lie on one device (static)."""
  return tokens // auto_axes()[TOKEN_AXIS] if _spread(tokens, 1) else tokens


def _spread(tokens: int, size: int) -> Axes:
  """(`seq`,) where it leaves each device whole tiles or blocks, or ()."""
  return () if tokens % size else dividing((TOKEN_AXIS,), tokens // size)


def _refuse(devices: int, tokens: int, tile: int, block: int) -> None:
  raise ValueError(
    f"mesh axis `{TOKEN_AXIS}` of {devices} devices leaves {tokens // devices}"
    f" of {tokens} tokens to each, which tiles of {tile} queries and blocks of"
    f" {block} keys do not divide: take smaller ones that do, or fewer devices"
    f" along `{TOKEN_AXIS}`."
  )
