# SPDX-License-Identifier: Apache-2.0
"""What looks at a cache are compared with: keys in dictionaries, by NumPy.

Axes: B batch, T tokens, P prompt tokens, H query heads, G key heads, W width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.core.attention import Keys, rotary

B, T, H, G, W, LAYERS = 3, 26, 4, 2, 8, 2
PROMPT = 14
LENGTHS = np.array([14, 3, 9])


def text(seed=0, scale=2.0):
  """`(q [B, T, H, W], k [B, T, G, W], v [B, T, G, W])`, without positions."""
  rng = np.random.default_rng(seed)
  draw = lambda heads: rng.normal(size=(B, T, heads, W)).astype(np.float32)
  return scale * draw(H), draw(G), draw(G)


def placed(q, k):
  """With rotary positions 0, 1, .., the same for all rows."""
  at = jnp.broadcast_to(jnp.arange(T), (B, T))
  return np.asarray(rotary(jnp.asarray(q), at)), np.asarray(
    rotary(jnp.asarray(k), at)
  )


def softmax(scores):
  odds = np.exp(scores - scores.max())
  return odds / odds.sum()


def replay(q, k, v, begin, keep):
  """One row, one key head: a prompt of `begin` tokens, then one by one.

  Args:
    q: [T, R, W], of the R heads that share the key head.
    k, v: [T, W].
    begin: tokens of the prompt.
    keep: `(held, weights, asked) -> positions`: what stays of the positions
      `held`, when the queries at positions `asked` gave them `weights`, a
      dictionary (head, query, key) -> attention.

  Returns:
    `(out [T, R, W], held)`: the latter after every step.
  """
  out, held, history = np.zeros(q.shape), [], []
  steps = [range(begin), *([t] for t in range(begin, len(q)))]
  for asked in steps:
    held, weights = [*held, *asked], {}
    for i in asked:
      seen = [j for j in held if j <= i]
      for r in range(q.shape[1]):
        given = softmax(k[seen] @ q[i, r] / np.sqrt(W))
        out[i, r] = given @ v[seen]
        weights.update({(r, i, j): a for j, a in zip(seen, given)})
    held = sorted(keep(held, weights, asked))
    history.append(held)
  return out, history


def read(look, q, k, v, *, slots=T, spoil=None, step=None):
  """The same by a look: all rows at once, the prompts padded on the right.

  Args:
    look, q, k, v: the look, and the text.
    slots: that the cache is asked for.
    spoil: changes the cache after each step.
    step: `look.step`, compiled.

  Returns:
    `(out [B, T, H, W], held)`: of row b, and what is kept after every step, a
    list of lists [step][b][g] of positions.
  """
  step = jax.jit(type(look).step) if step is None else step
  spoil = spoil or (lambda cache: cache)
  cache = look.empty_cache(LAYERS, B, G, slots, W, jnp.float32)
  out, held = np.zeros(q.shape, np.float32), []
  rows = np.arange(B)[:, None]

  def run(at, there):
    nonlocal cache
    safe = np.where(there, at, 0)
    heads_first = lambda a: jnp.moveaxis(jnp.asarray(a[rows, safe]), 2, 1)
    place = jnp.asarray(np.where(there, at, -1), jnp.int32)
    new = Keys(heads_first(k), heads_first(v), place[:, None])
    looked, cache = step(
      look, jnp.asarray(q[rows, safe]), new, place, cache, jnp.int32(1)
    )
    cache = spoil(cache.advance(jnp.asarray(there.sum(1), jnp.int32)))
    for b, t in np.argwhere(there):
      out[b, at[b, t]] = looked.out[b, t]
    held.append(kept(cache))

  at = np.broadcast_to(np.arange(PROMPT), (B, PROMPT))
  run(at, at < LENGTHS[:, None])
  for i in range(T - LENGTHS.min()):  # a row that has read all reads nothing
    at = LENGTHS[:, None] + i
    run(np.minimum(at, T - 1), at < T)
  return out, held


def kept(cache, layer=1):
  """Positions that a layer holds, rising, [b][g]."""
  pos = np.asarray(cache.pos[:, layer])
  return [[sorted(head[head >= 0].tolist()) for head in row] for row in pos]


def poisoned(cache):
  """NaN in all slots that are empty."""
  bad = (cache.pos < 0)[..., None]
  return cache._replace(
    k=jnp.where(bad, jnp.nan, cache.k), v=jnp.where(bad, jnp.nan, cache.v)
  )


def check(look, keep_of, *, slots=T, tolerance=2e-5):
  """The look finds and keeps what the dictionaries do, for every head.

  `keep_of()` makes the rule of one row and key head, with what it remembers.
  """
  q, k, v = text()
  q, k = placed(q, k)
  out, held = read(look, q, k, v, slots=slots)
  for b in range(B):
    for g in range(G):
      group = slice(g * H // G, (g + 1) * H // G)
      want, history = replay(
        q[b, :, group], k[b, :, g], v[b, :, g], LENGTHS[b], keep_of()
      )
      np.testing.assert_allclose(out[b, :, group], want, atol=tolerance)
      heads = g if look.per_head else 0
      for i, held_now in enumerate(history):
        if len(held_now) == slots:  # one goes for a token that never comes
          continue
        assert held[i][b][heads] == held_now, (b, g, i)
  return out
