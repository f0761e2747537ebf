# SPDX-License-Identifier: Apache-2.0
"""Law: a row of an encoder is that of all layers, cut off at its own exit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adaptivejax.core import Streak
from adaptivejax.methods.depth.pabee import patient_exit
from adaptivejax.nn import every_layer
from adaptivejax.nn.row_exit import row_exit
from adaptivejax.nn.stack import check_stack
from tests.methods.fewer_tokens import LENGTHS, TOKENS, B, D, L, encoder
from tests.methods.host import model as decoder


def above(level, l, said, pooled, memory):
  del l, pooled
  return said[:, 0] > level, memory


@functools.cache
def every():
  """`(said [L, B, D], state [L, B, N, D])` after each layer."""
  run = lambda m: m(TOKENS, lengths=LENGTHS, stack=every_layer).hidden
  hidden = jax.jit(run)(encoder())
  return np.asarray(jax.vmap(encoder().readout)(hidden)), np.asarray(hidden)


@jax.jit
def leave(model, level, min_depth=1, every=1):
  rule = Partial(above, level)
  stack = Partial(row_exit, rule=rule, min_depth=min_depth, every=every)
  return model(TOKENS, lengths=LENGTHS, stack=stack)


def levels():
  """A level that some row passes at first, and another row later."""
  said = every()[0][..., 0]
  return sorted(float(v) for v in (said[:-1, 1:] + said[:-1, :-1]).ravel() / 2)


@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_rows_leave_where_the_rule_says(which, least):
  said, _ = every()
  level = levels()[which]
  passed = said[..., 0] > level
  passed[: least - 1], passed[-1] = False, True
  want = passed.argmax(0)
  got = leave(encoder(), level, least)
  np.testing.assert_array_equal(got.depth[:, 0], want + 1)
  np.testing.assert_allclose(
    got.pooled, said[want, np.arange(B)], rtol=0, atol=1e-4
  )
  shares = (np.arange(L)[:, None] <= want).mean(1)
  np.testing.assert_allclose(got.shares, shares, atol=1e-6)


def test_some_leave_and_some_stay():
  depths = {
    tuple(np.asarray(leave(encoder(), v).depth[:, 0])) for v in levels()
  }
  assert any(len(set(d)) > 1 for d in depths)


def test_asked_at_every_other_layer():
  got = leave(encoder(), -1e9, 1, 2)
  np.testing.assert_array_equal(got.depth[:, 0], 2)


def test_never_leaving_is_all_layers():
  got = leave(encoder(), 1e9)
  real = np.arange(TOKENS.shape[1]) < np.asarray(LENGTHS)[:, None]
  want = np.asarray(encoder().norm(jnp.asarray(every()[1][-1])))
  np.testing.assert_allclose(
    np.asarray(got.x)[real], want[real], rtol=0, atol=1e-4
  )
  assert got.cost.share == pytest.approx(1.0, rel=1e-6)


def test_leaving_costs_less():
  spent = [float(leave(encoder(), v).cost.spent) for v in (-1e9, 1e9)]
  assert spent[0] < spent[1] / 2


def test_rules_of_classifiers_fit():
  rule = Partial(patient_exit, limit=jnp.int32(1))
  stack = Partial(row_exit, rule=rule, memory=Streak.none(B))
  got = jax.jit(lambda m: m(TOKENS, lengths=LENGTHS, stack=stack))(encoder())
  said = every()[0].argmax(-1)
  agree = np.vstack([np.zeros(B, bool), said[1:] == said[:-1]])
  agree[-1] = True
  np.testing.assert_array_equal(got.depth[:, 0], agree.argmax(0) + 1)
  assert got.pooled.shape == (B, D)


def test_what_does_not_fit_is_refused():
  stack = Partial(row_exit, rule=Partial(above, 0.0), min_depth=L + 1)
  with pytest.raises(ValueError, match=rf"1\.\.{L}"):
    check_stack(stack, encoder().layers)
  stack = Partial(row_exit, rule=Partial(above, 0.0))
  with pytest.raises(ValueError, match="`EncoderLayer`"):
    decoder()(TOKENS % 13, stack=stack)


def test_the_rule_does_not_see_padding():
  """Two tokens more of it at the end of every row change nothing."""
  lengths = jnp.minimum(jnp.asarray(LENGTHS), TOKENS.shape[1] - 2)

  def keep(l, said, pooled, memory):
    del said, memory
    return jnp.zeros(B, bool), jnp.where(l == L - 1, pooled, 0)

  def seen(tokens):
    stack = Partial(row_exit, rule=Partial(keep), memory=jnp.zeros((B, D)))
    return encoder()(tokens, lengths=lengths, stack=stack).notes

  short, long = seen(TOKENS[:, :-2]), seen(TOKENS)
  assert np.abs(short).max() > 0.1
  np.testing.assert_allclose(short, long, atol=1e-5)
