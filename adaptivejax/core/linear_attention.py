# SPDX-License-Identifier: Apache-2.0
"""Causal linear attention: a state of fixed size in place of keys.

Axes: B batch, T tokens, H query heads, G key heads, D key width, E value width.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from adaptivejax.core.attention import Keys
from pallas_kernels import linear_attention as kernels
from pallas_kernels.linear_attention.decay import forgetting
from pallas_kernels.linear_attention.reference import starts

LogDecay = Float32[Array, "#B #H #T"]
State = Float32[Array, "B H D E"]


def attend_linear(
  q: Float[Array, "B T H D"],
  keys: Keys,
  log_decay: LogDecay,
  state: State | None = None,
  *,
  chunk: int = 128,
  everyone: bool = False,
) -> tuple[Float[Array, "B T H E"], State]:
  """o_t = q_t S_t with S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T.

  A token whose position is -1 is not there: the state passes it unchanged, and
  it gets 0.

  Args:
    q: queries.
    keys: of the same tokens, in order.
    log_decay: at most 0.
    state: before the first token; zeros if None.
    chunk: see `pallas_kernels.linear_attention` (static).
    everyone: who is not there comes after all who are, as padding on the right
      does, and the state is not used: so decays need not ask (static).

  Returns:
    `(o, state)`.
  """
  there = keys.pos[:, :, :, None] >= 0
  q, k, v = (
    jnp.where(there, a, 0) for a in (jnp.moveaxis(q, 1, 2), keys.k, keys.v)
  )
  if q.shape[2] == 1 and state is not None:
    return _step(q, k, v, there, log_decay, state)
  if not everyone:
    log_decay = jnp.where(there[..., 0], log_decay, 0)
  out, state = kernels.linear_attention(
    q, k, v, log_decay, state=state, chunk=chunk
  )
  return jnp.moveaxis(out, 2, 1), state


def _step(q, k, v, there, log_decay, state):
  """One token, which may not be there."""
  log_decay = jnp.where(there[..., 0], log_decay, 0)
  one = lambda a: a[:, :, 0]
  out, state = kernels.linear_attention_step(
    one(q), one(k), one(v), state, one(log_decay)
  )
  return out[:, None], state


def linear_attention_sharded(
  q: Float[Array, "B H T D"],
  k: Float[Array, "B G T D"],
  v: Float[Array, "B G T E"],
  log_decay: LogDecay | None = None,
  segment: Int[Array, "B T"] | None = None,
  state: State | None = None,
  *,
  axis: str,
  chunk: int = 128,
) -> tuple[Float[Array, "B H T E"], State]:
  """`pallas_kernels.linear_attention` over a sequence that a mesh axis shares.

  For use in `jax.shard_map`: each device has T tokens of the whole, in order.
  Its tokens leave `total` of a state and add `local`; these pairs are combined
  from left to right in log2(devices) exchanges of one state each, and then each
  device attends from the state before its tokens.  Costs a product of keys and
  values more than one device would.

  Args:
    q, k, v: this device's tokens; k and v may have fewer heads.
    log_decay: of these; at most 0, none if None.
    segment: of these; where it changes, the state is forgotten.
    state: before the first token of all, the same on all devices.
    axis: name of the mesh axis.
    chunk: see there (static).

  Returns:
    `(o, state)`: of this device's tokens; after the last token of all, on all
    devices.
  """
  heads, tokens = q.shape[1:3]
  k, v = (jnp.repeat(a, heads // a.shape[1], axis=1) for a in (k, v))
  if log_decay is None:
    log_decay = jnp.zeros((1, 1, 1), jnp.float32)
  border = None
  if segment is not None:
    before = _from_left(segment[:, -1], axis, 1)
    first = (before != segment[:, 0]) & (lax.axis_index(axis) > 0)
    border = starts(segment).at[:, 0].set(first)[:, None]
  total, left = _left_over(log_decay, border, tokens)
  local = jnp.einsum(
    "bht,bhtd,bhte->bhde",
    jnp.broadcast_to(left, q.shape[:3]),
    k.astype(jnp.float32),
    v.astype(jnp.float32),
    precision=lax.Precision.HIGHEST,
  )
  if state is None:
    state = jnp.zeros_like(local)
  index, devices = lax.axis_index(axis), lax.axis_size(axis)
  local = local + jnp.where(index == 0, total * state, 0)
  reach = 1
  while reach < devices:  # what comes from beyond the first device is 0
    local = local + total * _from_left(local, axis, reach)
    total = total * _from_left(total, axis, reach)
    reach *= 2
  before = jnp.where(index == 0, state, _from_left(local, axis, 1))
  if border is not None:  # the kernel knows no token before the first
    before = jnp.where(border[:, :, :1, None], 0, before)
  out, _ = kernels.linear_attention(
    q, k, v, log_decay, segment, before, chunk=chunk
  )
  last = lax.psum(jnp.where(index == devices - 1, local, 0), axis)
  return out, last


def _left_over(log_decay, border, tokens):
  """Of a state before these tokens, and of each of these after the last.

  f32[B|1, H|1, 1, 1] and f32[B|1, H|1, T].
  """
  stop = forgetting(log_decay, border)
  decay = jnp.where(stop, 0, log_decay)
  shape = (*decay.shape[:2], tokens)
  decay, stop = (jnp.broadcast_to(a, shape) for a in (decay, stop))
  since = lambda a: jnp.cumsum(a[..., ::-1], axis=-1)[..., ::-1]
  sums, stops = since(decay), since(stop.astype(jnp.int32))
  total = jnp.where(stops[..., 0] == 0, jnp.exp(sums[..., 0]), 0)
  after = jnp.where(stops - stop == 0, jnp.exp(sums - decay), 0)
  return total[..., None, None], after


def _from_left(a: jax.Array, axis: str, reach: int) -> jax.Array:
  """What the device `reach` to the left has; 0 where there is none."""
  pairs = [(i, i + reach) for i in range(lax.axis_size(axis) - reach)]
  return lax.ppermute(a, axis, pairs)
