# SPDX-License-Identifier: Apache-2.0
"""Dense causal attention by positions, the twin of every sparse one.

Who may see whom is decided by positions, not by layout: a key is visible if its
position is in 0..position of the query.  So the same function serves training,
prefill and decode over a cache with holes.

Axes: B batch, T queries, S keys, H query heads, G key heads, D head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEVER = -1e30
"""Score of an invisible key; finite, so that an empty row stays finite."""


class Keys(NamedTuple):
  """Keys, values and their positions (-1 = no key here).

  Attributes:
    k: f[B, G, S, D].
    v: f[B, G, S, D].
    pos: i32[B, S].
  """

  k: Array
  v: Array
  pos: Array


def attend(
  q: Float[Array, "B T H D"],
  keys: Keys,
  positions: Int[Array, "B T"],
) -> Float[Array, "B T H D"]:
  """Softmax attention in f32; a query that sees no key gets zero."""
  batch, tokens, heads, width = q.shape
  groups = keys.k.shape[1]
  q = q.reshape(batch, tokens, groups, heads // groups, width)
  scores = jnp.einsum(
    "btgrd,bgsd->bgrts", q, keys.k, preferred_element_type=jnp.float32
  )
  pos = keys.pos[:, None, :]
  visible = ((pos >= 0) & (pos <= positions[:, :, None]))[:, None, None]
  scores = jnp.where(visible, scores / jnp.sqrt(jnp.float32(width)), NEVER)
  weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0)
  out = jnp.einsum("bgrts,bgsd->btgrd", weights.astype(keys.v.dtype), keys.v)
  return out.reshape(batch, tokens, heads, width)


def rotary(
  x: Float[Array, "*N H D"],
  positions: Int[Array, "*N"],
  base: float = 10_000.0,
) -> Float[Array, "*N H D"]:
  """Rotary position embedding, halves rotated (Su et al., 2021, eq. 34)."""
  half = x.shape[-1] // 2
  rate = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None, None].astype(jnp.float32) * rate
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(
    x.dtype
  )
