# SPDX-License-Identifier: Apache-2.0
"""Law: tokens merge layer by layer as a NumPy encoder merges lists of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adaptivejax.methods.tokens import similar_merging, token_merging
from adaptivejax.methods.tokens.token_merging import merged_counts
from adaptivejax.nn.stack import check_stack
from tests.methods.fewer_tokens import (
  LENGTHS,
  TOKENS,
  B,
  L,
  N,
  alike,
  encoder,
  most_alike,
  params,
  run,
)
from tests.methods.host import model as decoder


def oracle(rule):
  rows = zip(np.asarray(TOKENS), np.asarray(LENGTHS))
  return [run(params(encoder()), row[:n], rule, True) for row, n in rows]


def agree(got, want):
  """Tokens, sizes, places and depth, row by row."""
  for b, left in enumerate(want):
    n = len(left.x)
    assert got.tokens.lengths[b] == n
    np.testing.assert_allclose(got.x[b, :n], left.x, rtol=0, atol=1e-4)
    np.testing.assert_allclose(got.tokens.size[b, :n], left.size, atol=1e-4)
    real = len(left.origin)
    np.testing.assert_array_equal(got.tokens.origin[b, :real], left.origin)
    np.testing.assert_allclose(
      got.restored[b, :real], left.restored, rtol=0, atol=1e-4
    )
    np.testing.assert_array_equal(got.depth[b, :real], left.depth)
    np.testing.assert_allclose(got.pooled[b], left.x[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("merges", [2, 5])
def test_so_many_pairs_merge(merges):
  stack = functools.partial(token_merging, merges=merges)
  got = jax.jit(lambda m: m(TOKENS, lengths=LENGTHS, stack=stack))(encoder())
  assert got.x.shape[1] == N - L * merges
  agree(got, oracle(most_alike(merges)))


def test_layers_in_between_keep_all():
  stack = functools.partial(token_merging, merges=(0, 4, 0))
  got = jax.jit(lambda m: m(TOKENS, lengths=LENGTHS, stack=stack))(encoder())
  rule = lambda layer: most_alike(4 * (layer.l == 1))(layer)
  agree(got, oracle(rule))


@jax.jit
def similar(model, threshold, at):
  stack = Partial(similar_merging, threshold=threshold, at=at)
  return model(TOKENS, lengths=LENGTHS, stack=stack)


@pytest.mark.parametrize("threshold", [-2.0, 0.5, 0.75, 1.1])
def test_what_is_similar_merges(threshold):
  got = similar(encoder(), threshold, jnp.ones(L, bool))
  agree(got, oracle(alike(threshold)))


def test_the_threshold_is_met_by_some():
  counts = similar(encoder(), 0.75, jnp.ones(L, bool)).tokens.lengths
  assert ((counts > 4) & (counts < LENGTHS)).all()


def test_layers_are_data():
  at = jnp.asarray([False, True, False])
  got = similar(encoder(), 0.5, at)
  agree(got, oracle(lambda layer: alike((2, 0.5, 2)[layer.l])(layer)))


def test_equal_tokens_become_one_without_a_trace():
  """Proportional attention: a key of size n attracts as n equal keys do."""
  model = jax.tree.map(lambda a: a, encoder())
  model.embedding.places.set_value(0 * model.embedding.places.get_value())
  tokens = jnp.asarray([[1, 2, 3, 2, 3, 2, 2, 2, 5, 2]])
  stack = Partial(similar_merging, threshold=0.9999)
  got = jax.jit(lambda m: m(tokens, stack=stack))(model)
  assert got.tokens.lengths[0] < 8
  want = jax.jit(lambda m: m(tokens))(model)
  np.testing.assert_allclose(got.restored, want.x, rtol=0, atol=1e-4)


def test_half_of_the_tokens_is_the_most():
  assert merged_counts(24, 100, 4) == (13, 7, 4, 3)
  assert merged_counts(24, (1, 2, 3), 3) == (23, 21, 18)
  assert merged_counts(24, 100, 4, protected=0) == (12, 6, 3, 2)[:0] + (
    12,
    6,
    3,
    1,
  )


def test_the_cost_is_that_of_the_tokens_left():
  stack = functools.partial(token_merging, merges=4)
  out = jax.jit(lambda m: m(TOKENS, stack=stack))(encoder())
  c, n, spent = encoder().config, N, 0
  for _ in range(L):
    spent += B * (n * 8 * c.features**2 + 4 * n * n * c.features)
    sources = (n + 1) // 2
    spent += 2 * B * sources * (n - sources) * c.features // c.heads
    n -= 4
    spent += B * n * 4 * c.features * c.hidden
  full = L * B * N * (8 * c.features**2 + 4 * c.features * (N + c.hidden))
  np.testing.assert_allclose(out.cost.spent, spent, rtol=1e-6)
  np.testing.assert_allclose(out.cost.full, full, rtol=1e-6)


@pytest.mark.parametrize("merges", [-1, (1, 2)])
def test_bad_numbers_are_refused(merges):
  stack = functools.partial(token_merging, merges=merges)
  with pytest.raises(ValueError, match="at least 0, one number or 3"):
    check_stack(stack, encoder().layers)


def test_decoders_are_refused():
  stack = Partial(similar_merging, threshold=0.5)
  with pytest.raises(ValueError, match="`EncoderLayer`.*got Block"):
    decoder()(TOKENS % 13, stack=stack)


def test_layers_that_are_not_there_are_refused():
  stack = functools.partial(similar_merging, threshold=0.5, at=(0, 3))
  with pytest.raises(ValueError, match=r"layers in 0\.\.2"):
    encoder()(TOKENS, stack=stack)
