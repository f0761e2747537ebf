# SPDX-License-Identifier: Apache-2.0
"""The maths of one chunk of one head, for XLA and for the kernels alike.

With c_i the sum of log decays in the chunk up to token i, and R the gradient of
the state that leaves the chunk (Qin et al., 2024, alg. 1 and 2, per token):

    o_i   = sum_j<=i e^(c_i - c_j) (q_i . k_j) v_j + e^(c_i) q_i S
    S'    = e^(c_C) S + sum_j e^(c_C - c_j) k_j v_j^T

Axes: C tokens of the chunk, D key width, E value width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MATRIX = (((1,), (0,)), ((), ()))  # a b
RIGHT = (((1,), (1,)), ((), ()))  # a b^T
LEFT = (((0,), (0,)), ((), ()))  # a^T b


class Powers(NamedTuple):
  """What is left of one token at another, in 0..1, all f32.

  Attributes:
    pair: of token j at token i, 0 for j > i or across a border, [C, C].
    into: of the state at token i, [C, 1].
    out_of: of token j after the chunk, [C, 1].
    total: of the state after the chunk, [1, 1].
  """

  pair: jax.Array
  into: jax.Array
  out_of: jax.Array
  total: jax.Array


class Gradients(NamedTuple):
  """Of the inputs of a chunk, f32.

  Attributes:
    q, k: [C, D].
    v: [C, E].
    log_decay: [1, C].
    state: [D, E].
  """

  q: jax.Array
  k: jax.Array
  v: jax.Array
  log_decay: jax.Array
  state: jax.Array


def powers(marks: jax.Array) -> Powers:
  """From the sums of log decays and the count of borders, f32[2, C]."""
  size = marks.shape[1]
  sum_j, run_j = (
    jnp.broadcast_to(marks[n : n + 1], (size, size)) for n in (0, 1)
  )
  sum_i, run_i = sum_j.T, run_j.T
  i, j = (lax.broadcasted_iota(jnp.int32, (size, size), n) for n in (0, 1))
  pair = jnp.exp(jnp.minimum(sum_i - sum_j, 0))
  pair = jnp.where((j <= i) & (run_i == run_j), pair, 0)
  sums, runs = sum_i[:, :1], run_i[:, :1]  # [C, 1]
  end, last = sums[size - 1 :], runs[size - 1 :]  # [1, 1]
  return Powers(
    pair,
    jnp.where(runs == 0, jnp.exp(sums), 0),
    jnp.where(runs == last, jnp.exp(jnp.minimum(end - sums, 0)), 0),
    jnp.where(last == 0, jnp.exp(end), 0),
  )


def forward(q, k, v, state, p: Powers) -> tuple[jax.Array, jax.Array]:
  """`(o, state)`, f32[C, E] and f32[D, E]."""
  scores = _dot(q, k, RIGHT) * p.pair
  out = _dot(scores.astype(v.dtype), v)
  out = out + p.into * _dot(q, state.astype(q.dtype))
  late = (k * p.out_of).astype(k.dtype)
  return out, p.total * state + _dot(late, v, LEFT)


def backward(q, k, v, state, p: Powers, dout, dstate) -> Gradients:
  """Of the inputs, given those of `o` and of the state that leaves, R.

  The log decay of token t counts in all that passes it, from a token j < t or
  the state before, to a token i >= t or the state after.
  """
  scores = _dot(q, k, RIGHT)
  dscores = _dot(dout, v, RIGHT) * p.pair
  products = scores * dscores
  scores = (scores * p.pair).astype(dout.dtype)
  given = p.into * _dot(dout, state.astype(dout.dtype), RIGHT)  # by the state
  kept = p.out_of * _dot(v, dstate.astype(v.dtype), RIGHT)  # by the state after
  late = (k * p.out_of).astype(k.dtype)
  early = (q * p.into).astype(dout.dtype)
  narrow = dscores.astype(q.dtype)
  left = p.total * dstate
  size = len(q)
  i, t = (lax.broadcasted_iota(jnp.int32, (size, size), n) for n in (0, 1))
  between = jnp.where(i == t, 0, products)  # what comes and goes at one token
  arrives = between.sum(1, keepdims=True) - _column(between)
  arrives = arrives + (q * given).sum(1, keepdims=True)
  leaves = (k * kept).sum(1, keepdims=True)
  passes = (left * state).sum(keepdims=True)
  passes = passes + jnp.where(i >= t, arrives, leaves).sum(0, keepdims=True)
  return Gradients(
    _dot(narrow, k) + given,
    _dot(narrow, q, LEFT) + kept,
    _dot(scores, dout, LEFT) + _dot(late, dstate.astype(late.dtype)),
    passes,
    left + _dot(early, dout, LEFT),
  )


def _column(a):
  """Sums over rows, [C, C] -> [C, 1]."""
  sums = jnp.broadcast_to(a.sum(0, keepdims=True), a.shape)
  return sums.T[:, :1]


def _dot(a, b, dimensions=MATRIX):
  """In f32, and exact where the operands are."""
  exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(
    a, b, dimensions, precision=exact, preferred_element_type=jnp.float32
  )
