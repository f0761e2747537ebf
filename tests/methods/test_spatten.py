# SPDX-License-Identifier: Apache-2.0
"""Law: SpAtten prunes tokens and heads from layer to layer, for good.

The oracle reads a text layer by layer with sets of what is left.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adaptivejax.core.attention import Keys
from adaptivejax.decode import generate
from adaptivejax.methods.decode import SelfSpeculation
from adaptivejax.methods.kv import SpAtten
from adaptivejax.nn import by_plan, with_look
from tests.methods import host, kv

STEPS, LAYERS = 4, 3
LENGTHS = kv.LENGTHS
STEP = jax.jit(SpAtten.step)


def texts():
  """`[(q, k, v)]` of each layer; the second key head says more."""
  louder = np.array([1, 2], np.float32)[:, None]
  drawn = [kv.text(seed) for seed in range(LAYERS)]
  return [(*kv.placed(q, k), v * louder) for q, k, v in drawn]


def oracle(b, tokens, heads, order, recent=1):
  """Row b: what each layer found and left, step by step.

  Returns:
    `[(out {(position, head): [W]}, tokens left, heads left)]`.
  """
  share, found = kv.H // kv.G, []
  worth, size = np.zeros(kv.T), np.zeros(kv.G)

  def best(items, worth, part, least):
    keep = max(int(np.round(len(items) * (1 - part))), least)
    return set(sorted(sorted(items), key=lambda i: -worth(i))[:keep])

  first = [list(range(LENGTHS[b]))]
  for asked in first + [[LENGTHS[b] + i] for i in range(STEPS)]:
    left, live = set(range(asked[-1] + 1)), set(range(kv.G))
    for layer in order:
      q, k, v = (a[b] for a in texts()[layer])
      out = {}
      for i, h in np.ndindex(kv.T, kv.H):
        g = h // share
        if i not in asked or i not in left or g not in live:
          out[i, h] = np.zeros(kv.W)
          continue
        seen = sorted(j for j in left if j <= i)
        weights = kv.softmax(k[seen, g] @ q[i, h] / np.sqrt(kv.W))
        out[i, h] = weights @ v[seen, g]
        worth[seen] += weights
        size[g] += np.abs(out[i, h]).sum()
      last = {j for j in left if j > asked[-1] - recent}
      price = lambda j, last=last: np.inf if j in last else worth[j]
      left = best(left, price, tokens, len(last))
      live = best(live, lambda g: size[g], heads, 1)
      found.append((asked, out, left, live))
  return found


def read(look, order=tuple(range(LAYERS)), spoil=None):
  """All rows at once: `[(positions [B, T], out, cascade)]`, as the oracle.

  `spoil(cache, step, layer)` changes the cache before a layer reads.
  """
  spoil = spoil or (lambda cache, *_: cache)
  cache = look.empty_cache(LAYERS, kv.B, kv.G, kv.T, kv.W, jnp.float32)
  rows, found = np.arange(kv.B)[:, None], []
  places = np.arange(kv.PROMPT)
  steps = [np.where(places < LENGTHS[:, None], places, -1)]
  steps += [LENGTHS[:, None] + i for i in range(STEPS)]
  for n, at in enumerate(steps):
    place = jnp.asarray(at, jnp.int32)
    for layer in order:
      q, k, v = (jnp.asarray(a[rows, at]) for a in texts()[layer])
      new = Keys(jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), place[:, None])
      cache = spoil(cache, n, layer)
      looked, cache = STEP(look, q, new, place, cache, jnp.int32(layer))
      found.append((at, np.asarray(looked.out), cache.recollect(0)))
    cache = cache.advance((place >= 0).sum(1))
  return found


@pytest.mark.parametrize(
  ("tokens", "heads", "order", "recent"),
  [
    (0.3, 0.0, (0, 1, 2), 1),
    (0.5, 0.5, (0, 1, 2), 4),
    (1.0, 1.0, (0, 1, 2), 1),
    (0.4, 0.5, (1, 2), 1),
  ],
)
def test_is_the_cascade_of_sets(tokens, heads, order, recent):
  """Of prompts and decoding, with all layers and without the first."""
  got = read(SpAtten(tokens, heads, recent=recent), order)
  for b in range(kv.B):
    want = oracle(b, tokens, heads, order, recent)
    for (at, out, cascade), (asked, found, left, live) in zip(got, want):
      for t, i in enumerate(at[b]):
        for h in range(kv.H if i >= 0 else 0):
          np.testing.assert_allclose(out[b, t, h], found[i, h], atol=2e-5)
      there = np.arange(asked[-1] + 1)
      assert set(there[~cascade.no_token[b, : len(there)]]) == left
      assert set(np.flatnonzero(~cascade.no_head[b])) == live


def test_what_is_pruned_stays_pruned_until_the_next_token():
  found = read(SpAtten(0.4, 0.5))
  gone = [(c.no_token, c.no_head) for _, _, c in found]
  for first in range(0, len(gone), LAYERS):
    for a, b in zip(gone[first : first + LAYERS], gone[first + 1 :][:2]):
      assert all(np.all(y >= x) for x, y in zip(a, b))
      assert b[0][0].sum() > a[0][0].sum(), "the longest row shrinks"
    if first:
      back = gone[first - 1][0] & ~gone[first][0]
      assert back.any(), "each token starts with all again"


def test_what_is_pruned_goes_nowhere():
  """NaN at the slots and heads that the layer before gave up."""
  look = SpAtten(0.5, 0.5)
  clean = read(look)
  assert clean[-3][2].no_token.any(1).all() and clean[-3][2].no_head.any()

  def spoil(cache, step, layer):
    if step < STEPS or layer == 0:
      return cache
    before = clean[step * LAYERS + layer - 1][2]
    bad = before.no_token[:, None] | before.no_head[..., None]
    bad |= cache.pos[:, layer] < 0
    put = lambda a: a.at[:, layer].set(
      jnp.where(bad[..., None], jnp.nan, a[:, layer])
    )
    return cache._replace(k=put(cache.k), v=put(cache.v))

  for (_, a, x), (_, b, y) in zip(clean, read(look, spoil=spoil)):
    np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, x, y)


def model(tokens, heads=0.0):
  return with_look(host.model(), SpAtten(tokens, heads))


def test_a_row_that_reads_nothing_starts_anew():
  """It waits for others between its prompt and its first token."""
  pruning, lengths = model(0.6), jnp.array([5, 4, 3])
  read = jax.jit(lambda tokens, cache, n: pruning(tokens, cache, lengths=n))
  cache = pruning.empty_cache(host.B, 8)
  cache = read(host.TOKENS[:, :5], cache, lengths).cache
  one, last = jnp.ones(host.B, jnp.int32), host.TOKENS[:, 5:6]
  want = read(last, cache, one).logits
  waited = read(last, cache, 0 * one).cache
  np.testing.assert_array_equal(read(last, waited, one).logits, want)


def test_a_plan_may_leave_layers_out():
  """The first that runs sees all: one layer alone prunes nothing."""
  plan = jnp.array([[False] * 2, [False] * 2, [True, True], [False] * 2])
  stack = Partial(by_plan, plan=plan)
  tokens = host.TOKENS[:, :6]

  module = model(1.0)
  cache = module(tokens[:, :5], module.empty_cache(host.B, 8)).cache
  before = cache.recollect(0).tokens[:, :6]
  cache = module(tokens[:, 5:], cache, stack=stack).cache
  written = np.asarray(cache.pos[:, :, 0, 5])
  np.testing.assert_array_equal(written, [[-1, -1, 5, -1]] * host.B)
  left = ~np.asarray(cache.recollect(0).no_token)[:, :6]
  np.testing.assert_array_equal(left, [[False] * 5 + [True]] * host.B)
  got = cache.recollect(0).tokens[:, :6]
  assert (got > before).all(), "the one layer that ran looked at all"


def test_refusals_in_words():
  with pytest.raises(ValueError, match="empty_cache"):
    model(0.5)(host.TOKENS)
  with pytest.raises(ValueError, match="several tokens at once; SpAtten"):
    generate(model(0.5), host.TOKENS, steps=3, policy=SelfSpeculation(1, 2))
  for bad in (-0.1, 1.5):
    with pytest.raises(ValueError, match="0..1"):
      SpAtten(bad)
    with pytest.raises(ValueError, match="heads"):
      SpAtten(0.1, bad)
  with pytest.raises(ValueError, match="NaN"):
    SpAtten(float("nan"))
  with pytest.raises(ValueError, match="recent=0"):
    SpAtten(recent=0)
