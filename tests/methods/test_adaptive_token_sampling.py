# SPDX-License-Identifier: Apache-2.0
"""Law: a token stays if a point hits it, found by search in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import Partial

from adaptivejax.methods.tokens import adaptive_token_sampling
from adaptivejax.methods.tokens.adaptive_token_sampling import sampled
from adaptivejax.nn.stack import check_stack
from tests.methods.fewer_tokens import (
  LENGTHS,
  TOKENS,
  L,
  encoder,
  hit,
  params,
  run,
)


@jax.jit
def sample(model, samples, at):
  stack = Partial(adaptive_token_sampling, samples=samples, at=at)
  return model(TOKENS, lengths=LENGTHS, stack=stack)


@pytest.mark.parametrize("samples", [0, 5, 16, 100])
def test_tokens_that_are_hit_stay(samples):
  got = sample(encoder(), float(samples), jnp.ones(L, bool))
  for b, (row, n) in enumerate(zip(np.asarray(TOKENS), LENGTHS)):
    left = run(params(encoder()), row[:n], hit(samples))
    count = len(left.x)
    assert got.tokens.lengths[b] == count <= samples + 1
    np.testing.assert_allclose(got.x[b, :count], left.x, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(got.tokens.origin[b, :n], left.origin)
    np.testing.assert_allclose(
      got.restored[b, :n], left.restored, rtol=0, atol=1e-4
    )
    np.testing.assert_array_equal(got.depth[b, :n], left.depth)


def test_infinitely_many_points_hit_all():
  got = sample(encoder(), jnp.inf, jnp.ones(L, bool))
  np.testing.assert_array_equal(got.tokens.lengths, LENGTHS)


def test_layers_are_data():
  at = jnp.asarray([False, False, True])
  got = sample(encoder(), 6.0, at)
  for b, (row, n) in enumerate(zip(np.asarray(TOKENS), LENGTHS)):
    rule = lambda layer: hit(6 if layer.l == 2 else 10**5)(layer)
    left = run(params(encoder()), row[:n], rule)
    np.testing.assert_array_equal(got.tokens.origin[b, :n], left.origin)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_a_point_hits_where_the_sum_passes_it(seed, samples):
  """Scores are multiples of 1/256, so that nothing is rounded."""
  rng = np.random.default_rng(seed)
  score = rng.multinomial(256, rng.dirichlet(np.full(12, 0.3))) / 256
  upto, samples = np.cumsum(score), 2 ** (samples % 6)
  want = {0} | {
    int(np.searchsorted(upto, (2 * k - 1) / (2 * samples)))
    for k in range(1, samples + 1)
  }
  got = sampled(jnp.asarray(score[None], jnp.float32), float(samples))
  np.testing.assert_array_equal(np.flatnonzero(got[0]), sorted(want))


def test_peaked_scores_keep_fewer():
  flat = np.full((1, 64), 1 / 63, np.float32)
  peaked = np.exp(-np.arange(64.0))[None].astype(np.float32)
  flat[0, 0] = peaked[0, 0] = 0
  peaked /= peaked.sum()
  counts = [int(sampled(jnp.asarray(s), 32.0).sum()) for s in (flat, peaked)]
  assert counts[0] == 33 and counts[1] < 8


def test_nan_is_refused():
  stack = Partial(adaptive_token_sampling, samples=float("nan"))
  with pytest.raises(ValueError, match="`samples` is NaN"):
    check_stack(stack, encoder().layers)
