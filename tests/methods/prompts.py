"""Prompts for sparse looks, and attention by NumPy in double precision.

Axes: B batch, T queries, S keys, H query heads, G key heads, W head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.core.attention import Keys

B, H, G, W, BLOCK = 2, 4, 2, 8, 4


class Prompt(NamedTuple):
  """Queries and keys as NumPy arrays.

  Attributes:
    q: f32[B, T, H, W].
    k: f32[B, G, S, W].
    v: f32[B, G, S, W].
    at: positions of the queries, i32[B, T].
    pos: positions of the keys, i32[B, S].
  """

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  at: np.ndarray
  pos: np.ndarray

  def look(self, look):
    """What a look finds, and chose."""
    return _look(look, *self.arrays())

  def arrays(self):
    keys = Keys(*map(jnp.asarray, (self.k, self.v, self.pos[:, None])))
    return jnp.asarray(self.q), keys, jnp.asarray(self.at)


@jax.jit
def _look(look, q, keys, at):
  return look(q, keys, at), look.choose(q, keys, at)


def text(tokens=22, seed=0, scale=2.0):
  """A prompt by itself; its second row is shorter."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  at = np.tile(np.arange(tokens), (B, 1))
  at[1, tokens - 5 :] = -1
  q, k = scale * draw(B, tokens, H, W), draw(B, G, tokens, W)
  return Prompt(q, k, draw(B, G, tokens, W), at, at.copy())


def continued(seed=1):
  """More of a prompt in a cache: an odd start, empty slots, a row behind."""
  tokens, slots, start = 9, 26, np.array([11, 7])
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  at = start[:, None] + np.arange(tokens)
  pos = np.tile(np.arange(slots), (B, 1))
  pos = np.where(pos < start[:, None] + tokens, pos, -1)
  k, v = draw(B, G, slots, W), draw(B, G, slots, W)
  return Prompt(2 * draw(B, tokens, H, W), k, v, at, pos)


PROMPTS = {"text": text(), "continued": continued()}


def scores(p: Prompt):
  """f64[B, H, T, S], scaled."""
  k = np.repeat(p.k, H // G, axis=1).astype(np.float64)
  return np.einsum("bthw,bhsw->bhts", p.q.astype(np.float64), k) / np.sqrt(W)


def visible(p: Prompt):
  """bool[B, 1, T, S]."""
  seen = (p.pos[:, None] >= 0) & (p.pos[:, None] <= p.at[:, :, None])
  return seen[:, None]


def softmax(x, seen):
  """Over the last axis; 0 for what is not seen."""
  x = np.where(seen, x, -np.inf)
  top = x.max(-1, keepdims=True)
  e = np.exp(x - np.where(np.isfinite(top), top, 0))
  total = e.sum(-1, keepdims=True)
  return e / np.where(total > 0, total, 1)


def attention(p: Prompt):
  return softmax(scores(p), visible(p))


def pairs(p: Prompt, mask, columns=None):
  """Pairs that a choice lets see one another, bool[B, H, T, S]."""
  mask = np.broadcast_to(mask, (B, H, *np.shape(mask)[2:]))
  out = np.zeros((B, H, p.q.shape[1], p.k.shape[2]), bool)
  for t in range(out.shape[2]):
    for s in range(out.shape[3]):
      out[:, :, t, s] = mask[:, :, t // BLOCK, s // BLOCK]
      if columns is not None:
        out[:, :, t, s] |= np.asarray(columns)[:, :, s]
  return out & visible(p)


def masked(p: Prompt, allowed):
  """Attention over allowed pairs, f64[B, T, H, W]."""
  weights = softmax(scores(p), allowed & visible(p))
  v = np.repeat(p.v, H // G, axis=1)
  return np.einsum("bhts,bhsw->bthw", weights, v)


def tiles(p: Prompt):
  """Rows and places of each query tile and of each key block."""
  cut = lambda n: [np.arange(i, min(i + BLOCK, n)) for i in range(0, n, BLOCK)]
  return cut(p.q.shape[1]), cut(p.k.shape[2])


def seen_blocks(p: Prompt):
  """Blocks with a visible pair, bool[B, 1, Q, K]; positions are one run."""
  q, k = tiles(p)
  see = visible(p)[:, 0]
  return np.array(
    [[[see[b][np.ix_(t, s)].any() for s in k] for t in q] for b in range(B)]
  )[:, None]


def ends(p: Prompt):
  """The block of the first key, and blocks of a tile's own tokens."""
  q, k = tiles(p)
  out = np.zeros((B, 1, len(q), len(k)), bool)
  for b in range(B):
    for i, t in enumerate(q):
      own = p.at[b, t][p.at[b, t] >= 0]
      for j, s in enumerate(k):
        there = p.pos[b, s][p.pos[b, s] >= 0]
        out[b, 0, i, j] = bool(own.size) and (
          0 in there or bool(np.intersect1d(own, there).size)
        )
  return out


def slashed(p: Prompt, offsets):
  """Blocks with a pair at a chosen offset, of bool[B, H, S]."""
  q, k = tiles(p)
  see = visible(p)[:, 0]
  out = np.zeros((B, offsets.shape[1], len(q), len(k)), bool)
  for b, i, j in np.ndindex(B, len(q), len(k)):
    for t in q[i]:
      for s in k[j]:
        if see[b, t, s]:
          out[b, :, i, j] |= offsets[b, :, p.at[b, t] - p.pos[b, s]]
  return out


def lines(p: Prompt, count):
  """Mean attention of the last queries by key and by offset, [B, H, S]."""
  weights, size = attention(p), p.k.shape[2]
  columns, slashes = np.zeros((2, B, H, size))
  for b in range(B):
    last = np.argsort(-p.at[b], kind="stable")[:count]
    last = last[p.at[b, last] >= 0]
    for t in last:
      columns[b] += weights[b, :, t] / len(last)
      for s in range(size):
        if 0 <= p.pos[b, s] <= p.at[b, t]:
          slash = slashes[b, :, p.at[b, t] - p.pos[b, s]]
          slash += weights[b, :, t, s] / len(last)
  return columns, slashes


def best(x, k):
  """The k largest of the last axis, ties to the lower index."""
  order = np.argsort(-x, axis=-1, kind="stable")[..., :k]
  out = np.zeros(x.shape, bool)
  np.put_along_axis(out, order, True, axis=-1)
  return out


def fewest(mass, p, forced, allowed):
  """One by one, beside the forced ones, until a share p is held."""
  out = np.zeros(mass.shape, bool)
  for i in np.ndindex(mass.shape[:-1]):
    m, ok = np.where(allowed[i], mass[i], 0), allowed[i]
    chosen = forced[i] & ok
    for n in np.argsort(-np.where(chosen, -1, m), kind="stable"):
      if m[chosen].sum() >= p * m.sum() and p < 1:
        break
      chosen[n] = True
    out[i] = ok if p >= 1 else chosen & ok
  return out


def pooled(p: Prompt, rows=None):
  """Scaled scores of mean queries for mean keys, [B, H, Q, K]."""
  q, k = tiles(p)
  q = q if rows is None else rows
  out = np.zeros((B, H, len(q), len(k)))
  keys = np.repeat(p.k, H // G, axis=1).astype(np.float64)
  for b, i, j in np.ndindex(B, len(q), len(k)):
    t = [t for t in (q[i][b] if rows is not None else q[i]) if p.at[b, t] >= 0]
    s = [s for s in k[j] if p.pos[b, s] >= 0]
    if t and s:
      mean = p.q[b, t].astype(np.float64).mean(0)  # [H, W]
      out[b, :, i, j] = (mean * keys[b][:, s].mean(1)).sum(-1) / np.sqrt(W)
  return out


def planted(kind, seed=0, tokens=64, offsets=(7, 25)):
  """Attention with one structure in every head, and the pairs that have it.

  `vertical`: all look at some keys.  `slash`: all look at some distances.
  `block`: tiles look at some blocks.
  """
  rng = np.random.default_rng(seed)
  at = np.tile(np.arange(tokens), (B, 1))
  pair = np.zeros((tokens, tokens), bool)
  if kind == "vertical":
    pair[:, [3, 21, 37]] = True
  elif kind == "slash":
    for offset in offsets:
      pair |= at[0][:, None] - at[0] == offset
  else:
    for i in range(tokens // BLOCK):
      for j in rng.permutation(i + 1)[:2]:
        pair[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] = True
  pair &= np.tri(tokens, dtype=bool)
  # Queries that are rows of 12 * pair for keys that are unit vectors.
  q = np.broadcast_to(12.0 * pair * np.sqrt(tokens), (B, H, tokens, tokens))
  k = np.broadcast_to(np.eye(tokens), (B, G, tokens, tokens))
  v = rng.normal(size=k.shape)
  f32 = lambda a: np.ascontiguousarray(a, np.float32)
  return Prompt(f32(np.moveaxis(q, 1, 2)), f32(k), f32(v), at, at), pair


def recall(p: Prompt, chosen, pair):
  """The least share, over rows and heads, of planted pairs that were chosen."""
  got = pairs(p, chosen.mask, chosen.columns)
  return (got & pair).sum((2, 3)).min() / pair.sum()
