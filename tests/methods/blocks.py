# SPDX-License-Identifier: Apache-2.0
"""What looks that choose blocks are compared with: one query at a time, NumPy.

Axes: B batch, T tokens, H query heads, G key heads, W width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.core.attention import Keys

B, T, H, G, W = 2, 23, 4, 2, 6
AT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))


def drawn(seed=0, scale=2.0):
  """`(q [B, T, H, W], k [B, T, G, W], v [B, T, G, W])`."""
  rng = np.random.default_rng(seed)
  draw = lambda heads: rng.normal(size=(B, T, heads, W)).astype(np.float32)
  return scale * draw(H), draw(G), draw(G)


def keys_of(k, v, at=AT):
  """Head-major `Keys`."""
  heads_first = lambda a: jnp.moveaxis(jnp.asarray(a), 2, 1)
  return Keys(heads_first(k), heads_first(v), at[:, None])


def softmax(scores):
  odds = np.exp(scores - scores.max())
  return odds / odds.sum()


def mixed(q, k, v, seen):
  """One query [W] over the keys [T, W] at the indices `seen`; 0 for none."""
  seen = sorted(seen)
  if not seen:
    return np.zeros(v.shape[-1])
  return softmax(k[seen] @ q / np.sqrt(len(q))) @ v[seen]


def dense(q, k, v):
  out = np.zeros(q.shape)
  for b, t, h in np.ndindex(*q.shape[:3]):
    g = h * k.shape[2] // q.shape[2]
    out[b, t, h] = mixed(q[b, t, h], k[b, :, g], v[b, :, g], range(t + 1))
  return out


def masked(q, k, v, pairs):
  """`pairs` bool[B, H, T, T], differentiable: all scores, then a mask."""
  share = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(a, share, axis=2) for a in (k, v))
  score = jnp.einsum("bthw,bshw->bhts", q, k) / q.shape[-1] ** 0.5
  odds = jnp.where(pairs, jnp.exp(score), 0)
  odds = odds / jnp.maximum(odds.sum(-1, keepdims=True), 1e-30)
  return jnp.einsum("bhts,bshw->bthw", odds, v)


def stepwise(look, q, k, v, cuts, x=None, slots=T):
  """The same by a cache, in pieces of the lengths `cuts`, [B, T, H, W]."""
  cache = look.empty_cache(2, B, k.shape[2], slots, W, jnp.float32)
  out, begin = [], 0
  for size in cuts:
    part = slice(begin, begin + size)
    at = AT[:, part]
    new = keys_of(k[:, part], v[:, part], at)
    asked = None if x is None else x[:, part]
    looked, cache = step(look, jnp.asarray(q[:, part]), new, at, cache, asked)
    cache, begin = cache.advance(size), begin + size
    out.append(looked.out)
  return jnp.concatenate(out, axis=1), cache


@jax.jit
def step(look, q, keys, at, cache, x=None):
  """`(looked, cache)`, of layer 1."""
  return look.step(q, keys, at, cache, 1, x=x)


@jax.jit
def looked(look, q, keys, at, x=None):
  """Without a cache."""
  return look(q, keys, at, x=x)
