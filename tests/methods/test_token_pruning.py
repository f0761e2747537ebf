# SPDX-License-Identifier: Apache-2.0
"""Law: the tokens of most class attention stay, the rest is their mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.methods.tokens import token_pruning
from adaptivejax.methods.tokens.token_pruning import kept_counts
from adaptivejax.nn.stack import check_stack
from tests.methods.fewer_tokens import (
  LENGTHS,
  TOKENS,
  N,
  attended,
  encoder,
  params,
  run,
)


@functools.cache
def pruned(keep, at, fuse=True, padded=False):
  stack = functools.partial(token_pruning, keep=keep, at=at, fuse=fuse)
  lengths = LENGTHS if padded else None
  return jax.jit(lambda m: m(TOKENS, lengths=lengths, stack=stack))(encoder())


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("fuse", [True, False])
def test_the_most_attended_stay(keep, fuse):
  got = pruned(keep, (0, 2), fuse)
  rule = attended(keep, (0, 2), fuse)
  for b, row in enumerate(np.asarray(TOKENS)):
    left = run(params(encoder()), row, rule)
    assert got.x.shape[1] == len(left.x)
    np.testing.assert_allclose(got.x[b], left.x, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(got.tokens.origin[b], left.origin)
    np.testing.assert_array_equal(got.tokens.size[b], left.size)
    np.testing.assert_allclose(
      got.restored[b], left.restored, rtol=0, atol=1e-4
    )


def test_padding_goes_first():
  """Short rows keep more of theirs, and what stays is the most attended."""
  got = pruned(0.7, (1,), padded=True)
  room = kept_counts(N, 0.7, (1,), 3)[-1]
  for b, n in enumerate(np.asarray(LENGTHS)):
    assert got.tokens.lengths[b] == min(n, room)
    share = (room - 2) / (n - 1) if n > room else 1.0
    row = np.asarray(TOKENS)[b, :n]
    left = run(params(encoder()), row, attended(share, (1,)))
    np.testing.assert_allclose(
      got.x[b, : len(left.x)], left.x, rtol=0, atol=1e-4
    )


def test_counts_are_known_ahead():
  assert kept_counts(17, 0.5, (1, 2), 4) == (17, 10, 7, 7)
  assert kept_counts(17, 0.5, (1, 2), 4, fuse=False) == (17, 9, 5, 5)
  assert kept_counts(17, 1.0, (0,), 2) == (17, 17)


@pytest.mark.parametrize(
  ("keep", "at", "said"), [(1.5, (0,), "0..1"), (0.5, (3,), "0..2")]
)
def test_bad_settings_are_refused(keep, at, said):
  stack = functools.partial(token_pruning, keep=keep, at=at)
  with pytest.raises(ValueError, match=said):
    check_stack(stack, encoder().layers)


def test_gradients_reach_what_is_fused():
  stack = functools.partial(token_pruning, keep=0.3, at=(0,))

  def total(places):
    model = jax.tree.map(lambda a: a, encoder())
    model.embedding.places.set_value(places)
    return model(TOKENS[:1], stack=stack).x.sum()

  places = encoder().embedding.places.get_value()
  slope = jax.jit(jax.grad(total))(places)
  assert (jnp.abs(slope).max(1) > 1e-6).all()
