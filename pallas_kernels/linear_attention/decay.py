# SPDX-License-Identifier: Apache-2.0
"""Decays and borders of segments as the kernels take them.

Axes: B batch, H heads, T tokens, N chunks, C tokens of a chunk.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.reference import FORGETS


def forgetting(log_decay: jax.Array, border: jax.Array | None) -> jax.Array:
  """Tokens that keep nothing of the past, bool[B|1, H|1, T|1]."""
  strong = log_decay < FORGETS
  return strong if border is None else strong | border


def chunked(
  log_decay: jax.Array, border: jax.Array | None, tokens: int, chunk: int
) -> jax.Array:
  """Running sums and counts of each chunk, f32[B|1, H|1, N|1, 2, C].

  The first of the two is the sum of log decays from the first token of the
  chunk to each, the second the number of tokens among these that forget, whose
  log decay counts as 0.  There is one chunk for all where all are the same.

  Args:
    log_decay: f32[B|1, H|1, T|1].
    border: tokens that forget besides, bool[B, 1, T]; none if None.
    tokens: T; what fills up the last chunk forgets nothing.
    chunk: C.
  """
  stop = forgetting(log_decay, border)
  decay = jnp.where(stop, 0, log_decay)
  shape = decay.shape[:2]
  if decay.shape[2] == 1 and tokens % chunk == 0:
    size = chunk
  else:
    size = -(-tokens // chunk) * chunk
  place = jnp.arange(size) < tokens
  each = lambda a: jnp.where(
    place,
    jnp.pad(
      jnp.broadcast_to(a, (*shape, min(size, tokens))),
      ((0, 0), (0, 0), (0, max(size - tokens, 0))),
    ),
    0,
  ).reshape(*shape, -1, chunk)
  if decay.shape[2] == 1:
    count = jnp.cumsum(place.reshape(-1, chunk), axis=1, dtype=jnp.float32)
    sums = (count * decay[..., None], count * stop[..., None])
  else:
    sums = (
      jnp.cumsum(each(a), axis=3, dtype=jnp.float32) for a in (decay, stop)
    )
  return jnp.stack(list(sums), axis=3)
