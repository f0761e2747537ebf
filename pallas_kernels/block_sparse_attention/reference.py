# SPDX-License-Identifier: Apache-2.0
"""The meaning of block-sparse attention: dense, with a mask of all pairs.

Axes: as in `types`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  NEVER,
  UNMARKED,
  Attended,
  BlockLists,
  Marks,
  Rule,
)


def visible_pairs(
  shape: tuple[int, int, int, int],
  lists: BlockLists,
  marks: Marks,
  rule: Rule,
) -> jax.Array:
  """Which query sees which key, bool[B, H, T, S].

  Args:
    shape: (B, H, T, S), static.
    lists, marks, rule: see `types`.
  """
  batch, heads, queries, keys = shape
  listed = expanded(lists, queries, keys)
  listed = jnp.repeat(listed, heads // listed.shape[1], axis=1)
  q_pos = marks.q_pos
  if q_pos is None:
    q_pos = jnp.arange(queries)[None]
  kv_pos = marks.kv_pos
  if kv_pos is None:
    kv_pos = jnp.arange(keys)[None, None]
  kv_pos = jnp.repeat(kv_pos, heads // kv_pos.shape[1], axis=1)
  at, pos = q_pos[:, None, :, None], kv_pos[:, :, None, :]
  seen = listed & (at >= 0) & (pos >= 0)
  if rule.causal:
    seen &= pos <= at
  if rule.window is not None:
    seen &= pos > at - rule.window
  if marks.q_segment is not None and marks.kv_segment is not None:
    same = marks.q_segment[:, :, None] == marks.kv_segment[:, None, :]
    seen &= same[:, None]
  return jnp.broadcast_to(seen, (batch, heads, queries, keys))


def expanded(lists: BlockLists, queries: int, keys: int) -> jax.Array:
  """The pairs that `lists` name, bool[B, L, T, S]."""
  blocks = -(-keys // lists.block_kv)
  *lead, capacity = lists.index.shape
  valid = jnp.arange(capacity) < lists.count[..., None]
  hot = jax.nn.one_hot(jnp.where(valid, lists.index, -1), blocks, dtype=bool)
  if lists.rows is None:
    named = hot.any(-2)[..., None, :]  # [B, L, Q, 1, K]
    named = jnp.broadcast_to(named, (*lead, lists.block_q, blocks))
  else:
    named = (hot[..., None, :] & lists.rows[..., None]).any(-3)
  named = named.reshape(*lead[:2], -1, blocks)[:, :, :queries]
  return jnp.repeat(named, lists.block_kv, axis=-1)[..., :keys]


def block_sparse_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lists: BlockLists,
  marks: Marks = UNMARKED,
  rule: Rule = CAUSAL,
  *,
  mass: bool = False,
) -> Attended:
  """Softmax attention over the visible pairs, all of them computed.

  A key is as if it were not there for a query that does not see it, NaN
  included; a query that sees a key or value that is not finite gets NaN in
  `out` and `lse`, and gives no gradient.

  Args:
    q: queries, [B, H, T, D].
    k: keys, [B, G, S, D].
    v: values, [B, G, S, E].
    lists, marks, rule: see `types`.
    mass: return the attention that each listed block got.
  """
  batch, heads, queries, width = q.shape
  keys = k.shape[2]
  seen = visible_pairs((batch, heads, queries, keys), lists, marks, rule)
  each = lambda a: jnp.repeat(a, heads // a.shape[1], axis=1)
  bad = ~(jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1))
  broken = (seen & each(bad)[:, :, None]).any(-1)
  k, v = (jnp.where(bad[..., None], 0, a) for a in (k, v))
  scale = width**-0.5 if rule.scale is None else rule.scale
  scores = jnp.einsum(
    "bhtd,bhsd->bhts", q, each(k), preferred_element_type=jnp.float32
  )
  scores = scores * scale
  if rule.softcap is not None:
    scores = rule.softcap * jnp.tanh(scores / rule.softcap)
  if marks.kv_bias is not None:
    scores = scores + each(marks.kv_bias)[:, :, None]
  scores = jnp.where(seen, scores, NEVER)
  top = scores.max(-1, initial=NEVER)
  if marks.sinks is not None:
    top = jnp.maximum(top, marks.sinks[:, None])
  top = jax.lax.stop_gradient(top)
  weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0)
  total = weights.sum(-1)
  if marks.sinks is not None:
    total = total + jnp.exp(marks.sinks[:, None] - top)
  empty = total == 0
  safe = jnp.where(empty, 1, total)
  weights = weights / safe[..., None]
  out = jnp.einsum("bhts,bhse->bhte", weights, each(v).astype(jnp.float32))
  out = jnp.where(broken[..., None], jnp.nan, out)
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(safe))
  lse = jnp.where(broken, jnp.nan, lse)
  given = _mass(weights, lists) if mass else None
  return Attended(out.astype(q.dtype), lse, given)


def _mass(weights: jax.Array, lists: BlockLists) -> jax.Array:
  """Attention of each entry, f32[B, H, Q, C]."""
  batch, heads, queries, keys = weights.shape
  tiles, capacity = lists.index.shape[2:]
  blocks = -(-keys // lists.block_kv)
  pad = (
    (0, 0),
    (0, 0),
    (0, tiles * lists.block_q - queries),
    (0, blocks * lists.block_kv - keys),
  )
  parts = jnp.pad(jax.lax.stop_gradient(weights), pad)
  parts = parts.reshape(
    batch, heads, tiles, lists.block_q, blocks, lists.block_kv
  )
  of_block = parts.sum((3, 5))  # [B, H, Q, K]
  valid = jnp.arange(capacity) < lists.count[..., None]
  each = lambda a: jnp.repeat(a, heads // a.shape[1], axis=1)
  index = jnp.clip(each(lists.index), 0, blocks - 1)
  index = jnp.broadcast_to(index, (batch, *index.shape[1:]))
  got = jnp.take_along_axis(of_block, index, axis=3)
  return jnp.where(each(valid), got, 0)
