# SPDX-License-Identifier: Apache-2.0
"""Attention over a set of keys from attention over its parts.

Axes: n parts, E value width.
"""

import jax
import jax.numpy as jnp
from jax import lax


def merge_lse(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Joins attention over disjoint parts of the keys; exact, differentiable.

  Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867 (sec. 3.1).

  Args:
    outs: what each part gives, [n, ..., E].
    lses: log of the sum of exp of its scores, f32[n, ...]; -inf where it saw
      nothing.

  Returns:
    `(out, lse)` of all keys, [..., E] and f32[...]; 0 and -inf for a query that
    saw nothing in any part.  NaN of a part becomes NaN of the whole.
  """
  lses = lses.astype(jnp.float32)
  top = lax.stop_gradient(lses.max(0))
  top = jnp.where(jnp.isneginf(top), 0, top)
  weights = jnp.exp(lses - top)
  total = weights.sum(0)
  empty = total == 0
  divisor = jnp.where(empty, 1, total)
  out = (weights[..., None] * outs).sum(0) / divisor[..., None]
  lse = jnp.where(empty, -jnp.inf, top + jnp.log(divisor))
  return out.astype(outs.dtype), lse
