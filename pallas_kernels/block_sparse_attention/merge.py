# SPDX-License-Identifier: Apache-2.0
"""Joins attention over parts of the keys into attention over all of them.

Axes: N parts, D head width.
"""

import jax
import jax.numpy as jnp


def merge_lse(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Attention over disjoint sets of keys, from the attention over each.

  out = sum_n exp(lse_n - lse) out_n with lse = log sum_n exp(lse_n), as in
  FlashAttention-2 (Dao, 2023, https://arxiv.org/abs/2307.08691, section 3.1).
  Differentiable in both.

  Args:
    outs: of each part, [N, ..., D]; where a part saw nothing, anything.
    lses: of each part, f32[N, ...]; -inf where it saw nothing.

  Returns:
    `(out, lse)`, [..., D] and f32[...]; 0 and -inf where no part saw anything.

  Raises:
    ValueError: the shapes do not belong together.
  """
  if outs.ndim < 2 or outs.shape[:-1] != lses.shape:
    raise ValueError(
      "outs is [N, ..., D] and lses [N, ...]; got"
      f" {outs.shape} and {lses.shape}"
    )
  top = jax.lax.stop_gradient(lses.max(0))
  top = jnp.where(jnp.isneginf(top), 0, top)
  weights = jnp.exp(lses - top)
  total = weights.sum(0)
  empty = total == 0
  total = jnp.where(empty, 1, total)
  seen = (weights != 0)[..., None]  # NaN is not 0
  shares = (weights / total)[..., None]
  wide = jnp.where(seen, outs.astype(jnp.float32), 0)
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(total))
  return (shares * wide).sum(0).astype(outs.dtype), lse
