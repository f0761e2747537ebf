# SPDX-License-Identifier: Apache-2.0
"""Law: wrong input is a ValueError that names what, where, and the remedy."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from adaptivejax import core
from adaptivejax.core import select

X, MASK = jnp.ones((12, 4)), jnp.arange(12) % 2 == 0
double = lambda rows: rows * 2
half = lambda rows: rows[:, :2]
IDS, LOG = jnp.zeros((12, 2), jnp.int32), jnp.zeros((12, 2, 4))
TREE = core.Tree(IDS, IDS - 1)
DRAW = core.Draw(core.Sampling.of(), jax.random.split(jax.random.key(0), 12))


@pytest.fixture(autouse=True)
def unchecked():
  """As users import it: without the type checker of these tests."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


CALLS = {
  "mask of integers": (
    lambda op: op(double, X, MASK.astype(int)),
    "`mask` must be a boolean array.*got int32.*core.select",
  ),
  "mask is a list": (
    lambda op: op(double, X, [True] * 12),
    "`mask` must be a boolean array.*got list",
  ),
  "x and mask swapped": (
    lambda op: op(double, MASK, X),
    "`mask` must be a boolean array.*got float32",
  ),
  "mask without items": (
    lambda op: op(double, X[:0], MASK[:0]),
    r"`mask` must hold at least one item; got mask.shape=\(0,\)",
  ),
  "mask is a scalar": (
    lambda op: op(double, X, jnp.asarray(True)),
    r"at least one item; got mask.shape=\(\)",
  ),
  "x without arrays": (
    lambda op: op(double, (), MASK),
    "`x` holds no array",
  ),
  "x of other items": (
    lambda op: op(double, X[:5], MASK),
    r"leading axes of `x` must be those of `mask`, \(12,\).*\(5, 4\)",
  ),
  "x with a scalar leaf": (
    lambda op: op(double, {"h": X, "scale": 2.0}, MASK),
    r"leading axes of `x`.*got an array of shape \(\)",
  ),
  "f adds all rows": (
    lambda op: op(lambda rows: rows.sum(0), X, MASK),
    r"one row per row: given 12 rows it returned shape \(4,\)",
  ),
  "f returns a number": (
    lambda op: op(lambda rows: 1.0, X, MASK),
    r"one row per row: given 12 rows it returned shape \(\)",
  ),
  "f returns integers": (
    lambda op: op(lambda rows: rows.astype(int), X, MASK, keep=False),
    "floating-point rows; got int32.*outside",
  ),
  "f changes the shape and keeps": (
    lambda op: op(half, X, MASK),
    r"shape and dtype: given \[\(\(4,\).*returned \[\(\(2,\).*`keep=False`",
  ),
  "f changes the dtype and keeps": (
    lambda op: op(lambda rows: rows.astype(jnp.bfloat16), X, MASK),
    "same shape and dtype: given.*bfloat16.*`keep=False`",
  ),
  "f changes the structure and keeps": (
    lambda op: op(lambda rows: {"a": rows}, X, MASK),
    "same shape and dtype.*`keep=False`",
  ),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("op", [core.bucketed, core.masked])
@pytest.mark.parametrize("call, words", CALLS.values(), ids=CALLS)
def test_refused_by_bucketed_and_masked(call, words, op, jit):
  run = (lambda: call(op)) if not jit else jax.jit(lambda: call(op))
  with pytest.raises(ValueError, match=f"(?s){words}"):
    run()


SETTINGS = {
  "cover of more rows": (
    lambda: core.bucketed(double, X, MASK, cover=core.tiles(16)),
    r"cover.sizes=\(16,\).*more than the 12 items.*`default_cover\(12\)`",
  ),
  "cover is a size": (
    lambda: core.bucketed(double, X, MASK, cover=8),
    r"`cover` must be a `Cover`, as in `coins\(12\)`; got 8",
  ),
  "cover is a tuple": (
    lambda: core.bucketed(double, X, MASK, cover=(8, 4)),
    r"`cover` must be a `Cover`.*\(8, 4\)",
  ),
  "ladder falls": (lambda: core.ladder(8, 4), r"`rungs`.*ascend.*\(8, 4\)"),
  "ladder repeats": (lambda: core.ladder(4, 4), "`rungs`.*ascend"),
  "ladder from 0": (lambda: core.ladder(0, 4), "from at least 1"),
  "ladder of nothing": (lambda: core.ladder(), r"as in `ladder\(64, 256\)`"),
  "ladder of a list": (lambda: core.ladder([4, 8]), "whole numbers"),
  "coins rise": (lambda: core.coins(4, 8), r"`sizes`.*fall.*\(4, 8\)"),
  "coins of nothing": (lambda: core.coins(), "`sizes`"),
  "tile of 0": (lambda: core.tiles(0), "at least 1 row"),
  "tile of half a row": (lambda: core.tiles(1.5), "whole numbers.*1.5"),
  "no items to cover": (lambda: core.default_cover(0), "at least 1 item.*n=0"),
  "chunk of 0": (
    lambda: select.chunk_union(jnp.ones((4, 2), bool), 0),
    "`chunk` must be at least 1 item; got chunk=0",
  ),
  "k per item": (
    lambda: select.top_k(X[0], jnp.ones(4, int)),
    r"`k` must be one number or one per leading axis.*\(\); got shape \(4,\)",
  ),
  "p of another batch": (
    lambda: select.top_p(X, jnp.ones(3)),
    r"`p`.*leading axis of the scores, \(12,\); got shape \(3,\)",
  ),
  "level per item": (
    lambda: select.threshold(X[0], jnp.ones(4)),
    "`level` must be one number",
  ),
  "target without a place for the bonus": (
    lambda: core.draft_verify(IDS, LOG, LOG, DRAW, IDS[:, 0]),
    r"\(12, 2\).*target_log.shape=\(12, 2, 4\) must be \[B, d \+ 1, V\]",
  ),
  "draft of another length": (
    lambda: core.draft_verify(IDS[:, :1], LOG, LOG, DRAW, IDS[:, 0]),
    r"draft of shape \(12, 1\).*draft_log.shape=\(12, 2, 4\) must be",
  ),
  "tree of other rows": (
    lambda: core.tree_verify(TREE, LOG[:5], DRAW, IDS[:, 0], depth=1),
    r"at every node: tree.tokens.shape=\(12, 2\) but target_log.shape=\(5,",
  ),
  "tree of negative depth": (
    lambda: core.tree_verify(TREE, LOG, DRAW, IDS[:, 0], depth=-1),
    r"depth=-1 must be 0 \(the root alone\) or above",
  ),
}


@pytest.mark.parametrize("call, words", SETTINGS.values(), ids=SETTINGS)
def test_refused_settings(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def test_a_failed_call_leaves_no_trace():
  """The next call with good input works."""
  with pytest.raises(ValueError):
    core.bucketed(half, X, MASK)
  y, _ = core.bucketed(double, X, MASK)
  assert float(y[0, 0]) == 2
