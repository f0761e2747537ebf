# SPDX-License-Identifier: Apache-2.0
"""What laws draw: shapes, dtypes, scores, selections, lists, caches, budgets.

Compiling is what costs, so a law draws a shape seldom and values often: all but
`shapes` and `dtypes` keep the shapes that they are given.  An array is drawn as
its kind and the seed of its entries, which is quick, shrinks to the plainest
kind, and is what `--seed` repeats.

Axes: B batch, N items, H heads, Q query tiles, K key blocks, S slots, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from adaptivejax.core import KVCache, lists_from_mask

SEEDS = st.integers(0, 2**32 - 1)
KINDS = ("normal", "ties", "rising", "constant", "sparse", "wide")


def generators():
  """NumPy's generator of a drawn seed."""
  return SEEDS.map(np.random.default_rng)


def shapes(*most, least=1):
  """Axes of 1 to `most` each: odd ones and powers of two."""
  return st.tuples(*(st.integers(least, n) for n in most))


def dtypes():
  """Of weights."""
  return st.sampled_from([jnp.float32, jnp.bfloat16])


@st.composite
def arrays(draw, shape, dtype=jnp.float32, kinds=KINDS):
  """Finite numbers: the usual ones, ties, zeros, a thousandth to a hundred."""
  kind, rng = draw(st.sampled_from(kinds)), draw(generators())
  a = rng.normal(size=shape)
  if kind == "ties":
    a = a.round()
  elif kind == "rising":
    a = np.sort(a, axis=-1)
  elif kind == "constant":
    a = np.full(shape, rng.normal())
  elif kind == "sparse":
    a = a * (rng.random(shape) < 0.2)
  elif kind == "wide":
    a = a * 10 ** rng.uniform(-3, 1, shape)
  return jnp.asarray(a, dtype)


def scores(*shape):
  """Of a decision, in f32."""
  return arrays(shape)


@st.composite
def selections(draw, *shape):
  """Masks; none, all, one and all but one as often as any other count."""
  size = int(np.prod(shape))
  count = st.sampled_from([0, 1, size - 1, size]) | st.integers(0, size)
  chosen = draw(generators()).permutation(size) < draw(count)
  return jnp.asarray(chosen.reshape(shape))


@st.composite
def lists(draw, batch, heads, tiles, blocks, *, block_q, block_kv):
  """Lists of key blocks, among them empty and full ones."""
  mask = draw(selections(batch, heads, tiles, blocks))
  empty = draw(selections(batch, heads, tiles, 1))
  mask = mask & ~(empty & draw(st.booleans()))
  return lists_from_mask(mask, block_q=block_q, block_kv=block_kv)


@st.composite
def caches(draw, batch, layers, heads, slots, width):
  """Caches whose rows are of different lengths, with room for one more."""
  rng = draw(generators())
  cache = KVCache.empty(layers, batch, heads, slots, width)
  length = rng.integers(0, slots, batch).astype(np.int32)
  place = np.arange(slots, dtype=np.int32)
  pos = np.where(place < length[:, None], place, -1)[:, None, None]
  there = (pos >= 0)[..., None]
  filled = lambda: there * rng.normal(size=cache.k.shape)
  return cache._replace(
    k=jnp.asarray(filled(), jnp.float32),
    v=jnp.asarray(filled(), jnp.float32),
    pos=jnp.asarray(np.broadcast_to(pos, cache.pos.shape)),
    length=jnp.asarray(length),
  )


@st.composite
def budgets(draw, none, some, full):
  """Between no budget and the whole, of any structure these have."""
  share = draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=32))
  rng = draw(generators())
  named = draw(st.sampled_from([None, none, some, full]))
  if named is not None:
    return named

  def between(a, b):
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype == bool:
      return np.where(rng.random(a.shape) < share, b, a)
    if np.issubdtype(a.dtype, np.integer):
      return (a + np.round((b - a) * share)).astype(a.dtype)
    return (a + (b - a) * np.float32(share)).astype(a.dtype)

  return jax.tree.map(between, none, full)


@st.composite
def like(draw, tree, *, noise):
  """Arrays like those of `tree`, numbers moved.

  Integers and masks mean something (a position, a token), and stay.

  Args:
    tree: pytree of arrays.
    noise: how far floating-point numbers move, relative to their deviation.
  """
  rng = draw(generators())
  size = draw(st.sampled_from([0.0, 0.1, 1.0]).map(lambda s: s * noise))

  def move(a):
    if not jnp.issubdtype(a.dtype, jnp.floating):
      return a
    step = rng.normal(size=a.shape) * np.asarray(a, np.float32).std()
    return a + jnp.asarray(size * step, a.dtype)

  return jax.tree.map(move, tree)
