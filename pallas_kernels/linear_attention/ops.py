# SPDX-License-Identifier: Apache-2.0
"""The public linear attention: checks, padding, and where it runs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.linear_attention import tpu, xla
from pallas_kernels.linear_attention.decay import chunked, forgetting
from pallas_kernels.linear_attention.reference import FORGETS, starts
from pallas_kernels.varying import alike

DTYPES = (jnp.bfloat16, jnp.float32)
ROWS = 16
"""Tokens of a chunk are a multiple: what a register of bf16 holds."""


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  log_decay: jax.Array | None = None,
  segment: jax.Array | None = None,
  state: jax.Array | None = None,
  *,
  chunk: int = 128,
  interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
  """o_t = q_t S_t with S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T.

  In chunks (Sun et al., 2023, https://arxiv.org/abs/2307.08621, eq. 7; Qin et
  al., 2024, https://arxiv.org/abs/2401.04658, alg. 1 and 2): inside of a chunk
  all pairs, before it the state, in time linear in T.  There is no softmax, no
  scale and no norm.  Powers of decays are made in f32 of sums of logarithms,
  all of them at most 1: nothing overflows, however strong the decay.  Differs
  from the recurrence by rounding only, whatever the chunk.  Differentiable in
  q, k, v, log_decay and state, and in both results.

  Axes: B batch, H heads, G key heads, T tokens, D key width, E value width.

  Args:
    q: [B, H, T, D]; bf16 or f32.
    k: [B, G, T, D]; G divides H.
    v: [B, G, T, E].
    log_decay: at most 0, f32[B, H, T]; each axis may be 1 (one decay for all
      tokens is cheaper); below -30 all is forgotten.  No decay if None.
    segment: tokens of one document, i32[B, T]: where it changes the state is
      forgotten.  The first token goes on from `state`.
    state: S before the first token, f32[B, H, D, E]; zeros if None.
    chunk: tokens of a chunk, a multiple of 16 (static); 256 is faster on TPU,
      64 on CPU, and the gradient keeps a state for each.
    interpret: run the TPU kernels here, as in `pallas_call`; where None, they
      run on TPU, and XLA's matmuls elsewhere (static).

  Returns:
    `(o, state)`: [B, H, T, E] of the dtype of q, and S after the last token,
    f32[B, H, D, E].

  Raises:
    ValueError: shapes or dtypes do not fit together.
  """
  _check(q, k, v, log_decay, segment, state, chunk)
  batch, heads, tokens, width = q.shape
  k, v = (jnp.repeat(a, heads // a.shape[1], axis=1) for a in (k, v))
  if log_decay is None:
    log_decay = jnp.zeros((1, 1, 1), jnp.float32)
  if state is None:
    state = jnp.zeros((batch, heads, width, v.shape[3]), jnp.float32)
  border = None if segment is None else starts(segment)[:, None]
  chunk = min(chunk, -(-tokens // ROWS) * ROWS)
  pad = ((0, 0), (0, 0), (0, -tokens % chunk), (0, 0))
  q, k, v = (jnp.pad(a, pad) for a in (q, k, v))
  plan = _Plan(tokens, chunk, interpret)
  out, state = _attend(plan, *alike((q, k, v, log_decay, border, state)))
  return out[:, :, :tokens], state


def linear_attention_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  state: jax.Array,
  log_decay: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """One token: what `linear_attention` says of it, and the state after it.

  Args:
    q: [B, H, D].
    k: [B, G, D].
    v: [B, G, E].
    state: f32[B, H, D, E].
    log_decay: f32[B|1, H|1]; no decay if None.
  """
  k, v = (jnp.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
  wide = lambda a: a.astype(jnp.float32)
  if log_decay is not None:
    left = jnp.where(log_decay < FORGETS, 0, jnp.exp(log_decay))
    state = left[..., None, None] * state
  state = state + wide(k)[..., None] * wide(v)[..., None, :]
  out = jnp.einsum(
    "bhd,bhde->bhe", wide(q), state, precision=lax.Precision.HIGHEST
  )
  return out.astype(q.dtype), state


class _Plan(NamedTuple):
  """How to run: tokens before padding, tokens of a chunk, as `interpret`."""

  tokens: int
  chunk: int
  interpret: Any

  def marks(self, log_decay, border):
    return chunked(log_decay, border, self.tokens, self.chunk)

  def run(self, name: str, *args, **how):
    """`forward` or `backward`, where it fits."""
    ours = functools.partial(getattr(tpu, name), **how)
    plain = functools.partial(getattr(xla, name), **how)
    if self.interpret is not None:
      return ours(*args, interpret=self.interpret)
    return lax.platform_dependent(*args, tpu=ours, default=plain)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, log_decay, border, state):
  marks = plan.marks(log_decay, border)
  return plan.run("forward", q, k, v, marks, state, keep=False)[:2]


def _forward(plan, q, k, v, log_decay, border, state):
  marks = plan.marks(log_decay, border)
  out, end, states = plan.run("forward", q, k, v, marks, state, keep=True)
  return (out, end), (q, k, v, log_decay, border, states)


def _backward(plan, residuals, cotangents):
  q, k, v, log_decay, border, states = residuals
  marks = plan.marks(log_decay, border)
  dq, dk, dv, dg, dstate = plan.run(
    "backward", q, k, v, marks, states, *cotangents
  )
  dg = dg[:, :, : plan.tokens]
  dg = jnp.where(forgetting(log_decay, border), 0, dg)
  alone = [n for n, size in enumerate(log_decay.shape) if size == 1]
  dg = dg.sum(alone, keepdims=True).astype(log_decay.dtype)
  none = None if border is None else np.zeros(border.shape, jax.dtypes.float0)
  return dq, dk, dv, dg, none, dstate


_attend.defvjp(_forward, _backward)


def _check(q, k, v, log_decay, segment, state, chunk):
  """Raises where shapes and dtypes do not fit together."""
  shapes = f"q{q.shape}, k{k.shape}, v{v.shape}"
  if not q.ndim == k.ndim == v.ndim == 4:
    raise ValueError(f"q, k and v are [batch, heads, tokens, width]; {shapes}")
  batch, heads, tokens, width = q.shape
  if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
    raise ValueError(
      "q, k and v are all bfloat16 or all float32; got"
      f" {q.dtype}, {k.dtype} and {v.dtype}: cast them"
    )
  fits = k.shape[:3] == v.shape[:3] and (batch, tokens) == k.shape[::2]
  if not fits or width != k.shape[3] or 0 in (*q.shape, *v.shape):
    raise ValueError(
      "q is [B, H, T, D], k [B, G, T, D] and v [B, G, T, E], none of them"
      f" empty; got {shapes}"
    )
  if heads % k.shape[1]:
    raise ValueError(f"{k.shape[1]} key heads do not divide {heads} heads")
  whole = {
    "log_decay": (log_decay, (batch, heads, tokens), True),
    "segment": (segment, (batch, tokens), False),
    "state": (state, (batch, heads, width, v.shape[3]), False),
  }
  for name, (array, shape, ones) in whole.items():
    if array is None:
      continue
    same = len(array.shape) == len(shape) and all(
      n == size or (ones and n == 1) for n, size in zip(array.shape, shape)
    )
    if not same:
      raise ValueError(
        f"{name} is {list(shape)}{', each axis or 1' if ones else ''}; got"
        f" {list(array.shape)}"
      )
    exact = jnp.issubdtype(array.dtype, jnp.integer)
    if exact != (name == "segment") or not (
      exact or array.dtype == jnp.float32
    ):
      kind = "integers" if name == "segment" else "float32"
      raise ValueError(f"{name} must be {kind}; got {array.dtype}")
  if chunk < ROWS or chunk % ROWS:
    raise ValueError(f"{chunk=} must be a multiple of {ROWS}")
