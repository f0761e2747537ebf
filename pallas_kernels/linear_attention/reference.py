# SPDX-License-Identifier: Apache-2.0
"""The meaning of linear attention, twice: as a recurrence and as a sum.

Shapes and arguments as in `ops.linear_attention`; all in f32.
Axes: B batch, H heads, G key heads, T tokens, D key width, E value width.
"""

import jax
import jax.numpy as jnp
from jax import lax

FORGETS = -30.0
"""A log decay below this counts as -inf: under 1e-13 of the past is left."""


def starts(segment: jax.Array) -> jax.Array:
  """Tokens whose segment is not that of the token before, bool[B, T]."""
  changes = segment[:, 1:] != segment[:, :-1]
  return jnp.pad(changes, ((0, 0), (1, 0)))


def decays(q, log_decay, segment) -> jax.Array:
  """What each token leaves of the past, f32[B, H, T], in 0..1."""
  shape = q.shape[:3]
  if log_decay is None:
    log_decay = jnp.zeros((1, 1, 1), jnp.float32)
  left = jnp.where(log_decay < FORGETS, 0, jnp.exp(log_decay))
  if segment is not None:
    left = jnp.where(starts(segment)[:, None], 0, left)
  return jnp.broadcast_to(left, shape)


def recurrent(q, k, v, log_decay=None, segment=None, state=None):
  """S_t = a_t S_(t-1) + k_t v_t^T and o_t = q_t S_t, token by token."""
  left = decays(q, log_decay, segment)
  q32, k, v = _whole(q, k, v)
  if state is None:
    state = jnp.zeros((*q.shape[:2], q.shape[3], v.shape[3]), jnp.float32)

  def step(state, token):
    q, k, v, a = token
    state = a[..., None, None] * state + k[..., None] * v[..., None, :]
    return state, jnp.einsum("bhd,bhde->bhe", q, state)

  tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), (q32, k, v, left))
  with jax.default_matmul_precision("highest"):
    state, out = lax.scan(step, state, tokens)
  return jnp.moveaxis(out, 0, 2).astype(q.dtype), state


def quadratic(q, k, v, log_decay=None, segment=None, state=None):
  """o_i = sum over j <= i of (a_(j+1) ... a_i) (q_i . k_j) v_j: all pairs.

  The state given counts as a token before the first.
  """
  left = decays(q, log_decay, segment)
  tokens = q.shape[2]
  row = jnp.arange(tokens)
  # The product of a_l over j < l <= i, for each pair: [B, H, i, j].
  inside = row[:, None] > row  # [l, j]
  each = jnp.where(inside, left[..., :, None], 1)
  pair = jnp.where(row[:, None] >= row, jnp.cumprod(each, axis=2), 0)
  q32, k, v = _whole(q, k, v)
  with jax.default_matmul_precision("highest"):
    scores = jnp.einsum("bhid,bhjd->bhij", q32, k) * pair
    out = jnp.einsum("bhij,bhje->bhie", scores, v)
    end = jnp.einsum("bhj,bhjd,bhje->bhde", pair[:, :, -1], k, v)
    if state is not None:
      since = jnp.cumprod(left, axis=2)
      out = out + since[..., None] * jnp.einsum("bhid,bhde->bhie", q32, state)
      end = end + since[:, :, -1, None, None] * state
  return out.astype(q.dtype), end


def _whole(q, k, v):
  """In f32, each query head with keys of its own."""
  each = lambda a: jnp.repeat(a, q.shape[1] // a.shape[1], axis=1)
  return tuple(each(a).astype(jnp.float32) for a in (q, k, v))
