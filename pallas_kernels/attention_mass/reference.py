# SPDX-License-Identifier: Apache-2.0
"""The meaning of attention mass: all pairs at once.

Axes: as in `ops`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  BlockLists,
  Marks,
  Rule,
)


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
  """Attention that keys get; arguments as in `ops`."""
  (batch, heads, queries, width), keys = q.shape, k.shape[2]
  full = BlockLists(
    jnp.zeros((1, 1, 1, 1), jnp.int32),
    jnp.ones((1, 1, 1), jnp.int32),
    block_q=queries,
    block_kv=keys,
  )
  seen = reference.visible_pairs(
    (batch, heads, queries, keys), full, marks, rule
  )
  each = lambda a: jnp.repeat(a, heads // a.shape[1], axis=1)
  scale = width**-0.5 if rule.scale is None else rule.scale
  scores = jnp.einsum("bhtd,bhsd->bhts", q, each(k)).astype(jnp.float32) * scale
  if rule.softcap is not None:
    scores = rule.softcap * jnp.tanh(scores / rule.softcap)
  if marks.kv_bias is not None:
    scores = scores + each(marks.kv_bias)[:, :, None]
  scores = jnp.where(seen, scores, -jnp.inf)
  if lse is None:
    lse = jax.nn.logsumexp(scores, axis=-1)
    if marks.sinks is not None:
      lse = jnp.logaddexp(lse, marks.sinks[:, None])
  weights = jnp.exp(scores - jnp.where(lse == -jnp.inf, 0, lse)[..., None])
  weights = jnp.where(seen, weights, 0)
  if q_weight is not None:
    weights = (
      weights
      * jnp.broadcast_to(
        q_weight if q_weight.ndim == 3 else q_weight[:, None], lse.shape
      )[..., None]
    )
  height = block_q or queries
  tiles, blocks = -(-queries // height), -(-keys // block)
  pad = [
    (0, 0),
    (0, 0),
    (0, tiles * height - queries),
    (0, blocks * block - keys),
  ]
  weights = jnp.pad(weights, pad)
  weights = weights.reshape(batch, heads, tiles, height, blocks, block).sum(-1)
  mass = weights.sum(3) if reduce_q == "sum" else weights.max(3)
  return mass if block_q else mass[:, :, 0]
