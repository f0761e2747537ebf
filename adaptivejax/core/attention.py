# SPDX-License-Identifier: Apache-2.0
"""Dense causal attention by positions, the twin of every sparse one.

Who may see whom is decided by positions, not by layout: a key is visible if its
position is in 0..position of the query.  So the same function serves training,
prefill and decode over a cache with holes.

Axes: B batch, T queries, S keys, H query heads, G key heads, D head width, E
value width, P heads that hold different keys: 1 or G.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.per_head import is_ring, over_heads
from adaptivejax.core.quantise import dequantise
from adaptivejax.core.ring import ring_attention
from adaptivejax.core.rope import USUAL, Rope
from adaptivejax.core.token_chunks import scan_chunks
from adaptivejax.core.varying import vary, varying_axes
from pallas_kernels.block_sparse_attention import Marks, Rule

NEVER = -1e30
"""Score of an invisible key; finite, so that an empty row stays finite."""


class Keys(NamedTuple):
  """Keys, values and their positions (-1 = no key here).

  Attributes:
    k: f[B, G, S, D], or i8.
    v: f[B, G, S, E], or i8.
    pos: i32[B, P, S].
    bias: added to the scores of a key, f32[B, P, S]: the log of its size, where
      a key stands for several; 0 if None.
    scale: what one unit of `k` and one of `v` stand for, two f32[B, G, S],
      where these are i8; else None.
  """

  k: Array
  v: Array
  pos: Array
  bias: Array | None = None
  scale: tuple[Array, Array] | None = None


def attend(
  q: Float[Array, "B T H D"],
  keys: Keys,
  positions: Int[Array, "B T"],
  *,
  window: int | None = None,
  mask: Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T H E"]:
  """Softmax attention in f32; a query that sees no key gets zero.

  Args:
    q: queries.
    keys: keys and values, in any order.
    positions: of the queries.
    window: how many positions a query sees, its own included; all if not given
      (static).
    mask: pairs that may see one another, besides (dynamic); all if not given.

  A key is as if it were not there for a query that does not see it, NaN
  included; a query that sees a key or value that is not finite gets NaN.

  Under an ambient mesh a sequence over `seq` that looks at itself does so in a
  ring (`core.ring`), which has no forward-mode derivative.
  """
  if mask is None and is_ring(q.shape[1], keys.k.shape[2]):
    return _attend_in_a_ring(q, keys, positions, window)
  return _mix(*_weigh(q, keys, positions, window, mask))


def attend_with_mass(
  q: Float[Array, "B T H D"],
  keys: Keys,
  positions: Int[Array, "B T"],
  *,
  mask: Bool[Array, "B T S"] | None = None,
  chunk: int = 256,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B H S"]]:
  """`attend`, and the attention that each key got, summed over the queries.

  Args:
    q, keys, positions, mask: as there.
    chunk: queries whose weights exist at the same time (static).
  """

  def some(total, asked):
    q, positions, *mask = asked
    weights, *rest = _weigh(q, keys, positions, None, *mask)
    mass = weights.sum(3)  # [B, G, H/G, S]
    mass = mass.reshape(mass.shape[0], -1, mass.shape[-1])
    return total + mass, _mix(weights, *rest)

  arrays = (q, positions) if mask is None else (q, positions, mask)
  none = jnp.zeros((q.shape[0], q.shape[2], keys.k.shape[2]), jnp.float32)
  none = vary(none, varying_axes(keys, *arrays))
  mass, out = scan_chunks(some, none, arrays, (1, 1, 1), (0, -1, False), chunk)
  return out, mass


def attention_weights(
  q: Float[Array, "B T H D"], keys: Keys, positions: Int[Array, "B T"]
) -> Float[Array, "B H T S"]:
  """The softmax of `attend`; 0 for what a query does not see."""
  weights, *_ = _weigh(q, keys, positions)
  return weights.reshape(weights.shape[0], -1, *weights.shape[3:])


def _attend_in_a_ring(q, keys: Keys, positions, window):
  keys = dequantised(keys, q.dtype)
  marks = Marks(positions, keys.pos, kv_bias=keys.bias)
  run = functools.partial(ring_attention, rule=Rule(window=window))
  heads_first = jnp.swapaxes(q, 1, 2), keys.k, keys.v
  return jnp.swapaxes(over_heads(run, *heads_first, None, marks).out, 1, 2)


def _mix(weights, v, broken):
  """[B, T, H, E] of the values."""
  out = jnp.einsum("bgrts,bgsd->btgrd", weights.astype(v.dtype), v)
  if broken is not None:
    broken = jnp.moveaxis(broken, 2, 1)[..., None, None]
    out = jnp.where(broken, jnp.nan, out)
  return out.reshape(*out.shape[:2], -1, v.shape[-1])


def _weigh(q, keys: Keys, positions, window=None, mask=None):
  """`(weights f32[B, G, H/G, T, S], values, broken bool[B, G, T] | None)`."""
  batch, tokens, heads, width = q.shape
  keys = dequantised(keys, q.dtype)
  groups = keys.k.shape[1]
  visible = visible_keys(keys.pos, positions, window)
  if mask is not None:
    visible &= mask[:, None]
  k, v, broken = _readable(keys, visible)
  q = q.reshape(batch, tokens, groups, heads // groups, width)
  scores = jnp.einsum(
    "btgrd,bgsd->bgrts", q, k, preferred_element_type=jnp.float32
  )
  scores = scores / jnp.sqrt(jnp.float32(width))
  if keys.bias is not None:
    scores += keys.bias[:, :, None, None]
  visible = visible[:, :, None]
  scores = jnp.where(visible, scores, NEVER)
  weights = jnp.where(visible, jax.nn.softmax(scores, axis=-1), 0)
  return weights, v, broken


def visible_keys(
  pos: Int[Array, "B P S"],
  positions: Int[Array, "B T"],
  window: int | None = None,
) -> Bool[Array, "B P T S"]:
  """Which queries see which keys, by their positions and a window."""
  pos, at = pos[:, :, None, :], positions[:, None, :, None]
  visible = (pos >= 0) & (pos <= at)
  return visible if window is None else visible & (pos > at - window)


def dequantised(keys: Keys, dtype: DTypeLike) -> Keys:
  """Keys and values as numbers; themselves where these are no codes."""
  if keys.scale is None:
    return keys
  k, v = map(dequantise, (keys.k, keys.v), keys.scale)
  return keys._replace(k=k.astype(dtype), v=v.astype(dtype), scale=None)


def _readable(keys: Keys, visible: Bool[Array, "B P T S"]):
  """Keys and values that 0 can be multiplied with, and who should get NaN.

  A query's weight of 0 does not undo a NaN, so what is not finite is set to 0,
  and the queries that see it are told: bool[B, G, T].  For one query per row it
  is enough, and cheaper, to set to 0 what it does not see.
  """
  if visible.shape[2] == 1:
    seen = visible[:, :, 0, :, None]
    return jnp.where(seen, keys.k, 0), jnp.where(seen, keys.v, 0), None
  fine = lambda a: jnp.where(jnp.isfinite(a), a, 0)
  bad = ~(jnp.isfinite(keys.k).all(-1) & jnp.isfinite(keys.v).all(-1))
  broken = (visible & bad[:, :, None]).any(-1)
  return fine(keys.k), fine(keys.v), broken


def rotary(
  x: Float[Array, "*N H D"],
  positions: Int[Array, "*N"],
  rope: Rope = USUAL,
) -> Float[Array, "*N H D"]:
  """Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864).

  Eq. 34 with feature i paired with i + D/2, as GPT-NeoX and Llama lay it out,
  instead of with its neighbour.
  """
  half = x.shape[-1] // 2
  angle = positions[..., None, None].astype(jnp.float32) * rope.rates(half)
  return turn(x, jnp.cos(angle), jnp.sin(angle))


def turn(
  x: Float[Array, "*N D"], cos: Float[Array, "..."], sin: Float[Array, "..."]
) -> Float[Array, "*N D"]:
  """Each pair of features turned by its angle; `cos` and `sin` [..., D/2]."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  both = a * cos - b * sin, b * cos + a * sin
  return jnp.concatenate(both, -1).astype(x.dtype)
