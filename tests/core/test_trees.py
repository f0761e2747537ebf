# SPDX-License-Identifier: Apache-2.0
"""Law: a tree of drafts changes how fast a text comes, not the text."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.sampling import Draw, Sampling
from adaptivejax.core.trees import ABSENT, Tree, ancestors, depths, tree_verify
from tests.core import chain
from tests.core.chain import V

B, N = 6, 10
TABLE = jnp.asarray(chain.log(chain.P))
verify = jax.jit(tree_verify, static_argnames="depth")
sees, levels = jax.jit(ancestors), jax.jit(depths)
trees = hypothesis.given(seed=st.integers(0, 2**32 - 1))


def draws(rows, *setting, seed=0):
  keys = jax.random.split(jax.random.key(seed), rows)
  return Draw(Sampling.of(*setting), keys)


GREEDY = draws(B)


def grow(seed, rows=B, root=None):
  """Random trees with gaps, siblings of one token, and whole rows missing."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, V, (rows, N)).astype(np.int32)
  parent = np.full((rows, N), ABSENT, np.int32)
  parent[:, 0] = -1
  for b in range(rows):
    for n in range(1, N):
      if rng.random() < 0.8:
        parent[b, n] = rng.choice(np.flatnonzero(parent[b, :n] != ABSENT))
  if root is not None:
    tokens[:, 0] = root
  return Tree(tokens, parent)


def line(parent, n):
  """Node n and its ancestors, upwards."""
  return [] if n < 0 else [n, *line(parent, parent[n])]


@trees
def test_ancestors_and_depths(seed):
  tree = grow(seed)
  got, depth = map(np.asarray, (sees(tree), levels(tree)))
  for b in range(B):
    for n in range(N):
      exists = tree.parent[b, n] != ABSENT
      want = line(tree.parent[b], n) if exists else []
      np.testing.assert_array_equal(np.flatnonzero(got[b, n]), want[::-1])
      assert depth[b, n] == len(want) - 1


def walk(tree, best, b, node, depth):
  """Nodes and tokens from `node` on, by recursion."""
  token = best[b, node]
  for n in range(N):
    if tree.parent[b, n] == node and tree.tokens[b, n] == token and depth:
      nodes, tokens = walk(tree, best, b, n, depth - 1)
      return [node, *nodes], [token, *tokens]
  return [node], [token]


@pytest.mark.parametrize("depth", [0, 2, N])
@trees
def test_path_is_the_recursive_walk(depth, seed):
  tree = grow(seed)
  # mostly a token that some child holds, so that paths are long
  best = np.random.default_rng(seed).integers(0, V, (B, N))
  for b in range(B):
    for n in range(1, N, 2):
      if tree.parent[b, n] >= 0:
        best[b, tree.parent[b, n]] = tree.tokens[b, n]
  log = chain.log(np.eye(V, dtype=np.float32)[best])
  log[tree.parent == ABSENT] = np.nan  # reaches nothing
  out = verify(tree, log, GREEDY, np.zeros(B, np.int32), depth=depth)
  nodes, tokens, count = map(np.asarray, out)
  for b in range(B):
    want = walk(tree, best, b, 0, depth)
    padding = [0] * (depth + 1 - len(want[0]))
    assert count[b] == len(want[0])
    np.testing.assert_array_equal(nodes[b], want[0] + padding)
    np.testing.assert_array_equal(tokens[b], want[1] + padding)


def plain(draw):
  token = lambda last, at: draw.token(TABLE[last], at)[:, None]
  return lambda last, at: (token(last, at), jnp.ones_like(at))


def by_trees(draw, seen, depth=3):
  """Steps that verify a new random tree each, by the chain's table."""
  rows = len(draw.keys)
  shapes = [grow(seed, rows) for seed in range(3)]
  many = jax.tree.map(lambda *a: jnp.stack(a), *shapes)

  def step(last, at):
    pick = at[0] % 3
    tokens, parent = jax.tree.map(lambda a: a[pick], many)
    tree = Tree(tokens.at[:, 0].set(last), parent)
    log = draw.log_probs(TABLE[tree.tokens])
    path = tree_verify(tree, log, draw, at, depth=depth)
    jax.debug.callback(lambda count: seen.append(count), path.count)
    return path.tokens, path.count

  return step


@pytest.mark.parametrize("setting", [(0.0,), (1.0,), (0.7, 3, 0.9)], ids=str)
def test_text_is_that_of_plain_decoding(setting):
  """Token for token under the same keys, whatever the trees hold."""
  rows, length, seen = 200, 8, []
  draw = draws(rows, *setting)
  want = chain.write(plain(draw), rows, length)
  got = chain.write(by_trees(draw, seen), rows, length)
  np.testing.assert_array_equal(got, want)
  jax.effects_barrier()
  counts = np.concatenate(seen)
  assert counts.mean() > 1.3 and counts.max() == 4  # and fewer steps


def test_text_has_the_odds_of_the_target():
  """Siblings of one token get one chance together, not one each."""
  rows = 20_000
  draw, at = draws(rows, 1.0, seed=3), jnp.zeros(rows, jnp.int32)
  parent = jnp.asarray([-1, 0, 0, 0, 1, 2, 2], jnp.int32)
  tokens = jnp.asarray([0, 1, 2, 2, 3, 2, 3], jnp.int32)
  tree = Tree(*(jnp.tile(a, (rows, 1)) for a in (tokens, parent)))
  out = verify(tree, TABLE[tree.tokens], draw, at, depth=2)
  step = jax.jit(plain(draw))
  texts, row = np.array(out.tokens), np.arange(rows)
  for n in range(1, 3):  # those that ended early go on plainly
    last, end = texts[:, n - 1], np.asarray(out.count) <= n
    more = np.asarray(step(last, np.full(rows, n, np.int32))[0])[:, 0]
    texts[row[end], n] = more[end]
  assert set(np.unique(out.count)) == {1, 2, 3}
  chain.agree(texts)


def test_a_row_takes_the_same_path_alone():
  draw, at = draws(B, 1.0), jnp.asarray([4, 0, 2, 2, 9, 1])
  tree = jax.tree.map(jnp.asarray, grow(5))
  log = draw.log_probs(TABLE[tree.tokens])
  out = verify(tree, log, draw, at, depth=4)
  for b in range(B):
    one = draw._replace(keys=draw.keys[b, None])
    row = Tree(*(a[b, None] for a in tree))
    alone = verify(row, log[b, None], one, at[b, None], depth=4)
    chex.assert_trees_all_equal(list(alone), [a[b, None] for a in out])


def test_a_lone_root_is_plain_decoding():
  draw, at = draws(50, 1.0), jnp.arange(50) % 3
  last = jnp.arange(50) % V
  tree = Tree(last[:, None], jnp.full((50, 1), -1))
  out = verify(tree, TABLE[last][:, None], draw, at, depth=0)
  np.testing.assert_array_equal(out.tokens[:, 0], draw.token(TABLE[last], at))
  np.testing.assert_array_equal(out.nodes, 0)
  np.testing.assert_array_equal(out.count, 1)


def test_a_broken_tree_hangs_nothing():
  parent = jnp.asarray([[-1, 2, 1, 3]])
  tree = Tree(jnp.zeros((1, 4), jnp.int32), parent)
  assert sees(tree)[0, 0].tolist() == [True, False, False, False]
  log = jnp.log(jnp.full((1, 4, V), 1 / V))
  draw = draws(1)
  out = verify(tree, log, draw, jnp.zeros(1, jnp.int32), depth=9)
  assert out.count[0] == 1
