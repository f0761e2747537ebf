# SPDX-License-Identifier: Apache-2.0
"""Linear attention by XLA's matmuls: a scan over chunks, all heads at once.

Axes: B batch, H heads, T tokens, N chunks, C tokens of a chunk, D key width, E
value width; T = N C.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention import chunk as maths


def forward(q, k, v, marks, state, *, keep: bool):
  """`(o, state, states)`: f[B, H, T, E]; the state after all tokens, f32[B, H,
  D, E]; and if asked to `keep` it (static) the state before each chunk, f32[B,
  H, N, D, E], else None.

  Args:
    q, k: [B, H, T, D].
    v: [B, H, T, E].
    marks: f32[B|1, H|1, N|1, 2, C], see `decay.chunked`.
    state: the one before the first token, f32[B, H, D, E].
  """

  def step(state, tokens, powers):
    out, after = _each(maths.forward)(*tokens, state, powers)
    return after, (out.astype(q.dtype), state if keep else None)

  chunks = [_chunks(a, marks) for a in (q, k, v)]
  state, (out, states) = _scan(step, state, chunks, marks)
  states = None if states is None else jnp.moveaxis(states, 0, 2)
  return _joined(out), state, states


def backward(q, k, v, marks, states, dout, dstate):
  """Gradients of q, k, v, the log decay f32[B, H, T], and the first state.

  Args:
    q, k, v, marks: as in `forward`.
    states: what `forward` kept.
    dout: of o, [B, H, T, E].
    dstate: of the last state, f32[B, H, D, E].
  """

  def step(dstate, tokens, powers):
    q, k, v, dout, state = tokens
    made = _each(maths.backward)(q, k, v, state, powers, dout, dstate)
    narrow = (a.astype(b.dtype) for a, b in zip(made, (q, k, v)))
    return made.state, (*narrow, made.log_decay[..., 0, :, None])

  chunks = [_chunks(a, marks) for a in (q, k, v, dout)]
  chunks.append(jnp.moveaxis(states, 2, 0))
  dstate, made = _scan(step, dstate, chunks, marks, reverse=True)
  dq, dk, dv, dg = map(_joined, made)
  return dq, dk, dv, dg[..., 0], dstate


def _scan(step, state, chunks, marks, reverse=False):
  """Over chunks; powers that all of them share are made once."""
  shape = state.shape[:2]
  powers = lambda m: jax.tree.map(
    lambda a: jnp.broadcast_to(a, (*shape, *a.shape[2:])),
    _each(maths.powers)(m),
  )
  if marks.shape[2] == 1:
    shared = powers(marks[:, :, 0])
    body = lambda state, tokens: step(state, tokens, shared)
    return lax.scan(body, state, chunks, reverse=reverse)
  body = lambda state, chunk: step(state, chunk[0], powers(chunk[1]))
  each = chunks, jnp.moveaxis(marks, 2, 0)
  return lax.scan(body, state, each, reverse=reverse)


def _each(f):
  """Of one head, for all heads of all rows."""
  return jax.vmap(jax.vmap(f))


def _chunks(a, marks):
  """[B, H, T, X] -> [N, B, H, C, X]."""
  size = marks.shape[-1]
  a = a.reshape(*a.shape[:2], -1, size, a.shape[3])
  return jnp.moveaxis(a, 2, 0)


def _joined(a):
  """[N, B, H, C, X] -> [B, H, T, X]."""
  a = jnp.moveaxis(a, 0, 2)
  return a.reshape(*a.shape[:2], -1, a.shape[4])
