# SPDX-License-Identifier: Apache-2.0
"""Law: the first bad operation is named, wherever it hides."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from adaptivejax.core.buckets import bucketed
from adaptivejax.training import debug, train
from adaptivejax.training.debug import first_bad_operation
from tests.training import tiny


def in_a_scan(x):
  body = lambda carry, row: (carry - 1, jnp.log(carry) * row)
  return lax.scan(body, x[0], jnp.ones(5))[1]


def in_a_reversed_scan(x):
  body = lambda carry, row: (carry - 1, jnp.log(carry) * row)
  return lax.scan(body, x[0], jnp.ones(5), reverse=True)[1]


def in_a_while(x):
  return lax.while_loop(
    lambda c: c[0] < 9,
    lambda c: (c[0] + 1, c[1] - 1, jnp.log(c[1])),
    (0, x[0], x[0]),
  )


def in_a_branch(x):
  return lax.switch(
    jnp.int32(x[0]), [jnp.sin, jnp.cos, lambda x: jnp.log(-x)], x
  )


def in_an_adaptive_call(x):
  f = lambda rows: jnp.log(rows - 4)
  return bucketed(f, x[:, None], x > 2)[0]


def in_a_gradient(x):
  return jax.grad(lambda x: jnp.sqrt(0 * x).sum())(x)


def by_overflow(x):
  big = jnp.exp(100 * x)
  return big - big


CASES = {
  in_a_scan: "`log` of float32[] at .*test_debug.py:.*round 3 of a scan of 5",
  in_a_reversed_scan: "`log` .* round 1 of a scan of 5",
  in_a_while: "`log` .* round 3 of a loop",
  in_a_branch: "`log` of float32[3] at .*test_debug.py",
  in_an_adaptive_call: "`log` of .*test_debug.py",
  in_a_gradient: "in the gradient",
  by_overflow: "^NaN first from `sub` .*; before it, infinity from `exp` ",
}


@pytest.mark.parametrize("step", CASES, ids=lambda step: step.__name__)
def test_the_first_bad_operation(step):
  found = first_bad_operation(jax.jit(step), jnp.float32([2, 3, 3.5]))
  pattern = CASES[step].replace("[3]", r"\[3\]").replace("[]", r"\[\]")
  assert re.search(pattern, found), found


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_by_one_gives_what_the_step_gives(length, reverse):
  def step(x, scale, rows):
    def body(carry, row):
      carry = jax.checkpoint(jnp.tanh)(carry * scale) + row["a"]
      return carry, (carry[:2], row["a"] - row["b"].sum())

    carry, out = lax.scan(body, x, rows, reverse=reverse)
    many = lax.while_loop(lambda c: c.sum() < 50, lambda c: c * scale, x)
    some = lax.cond(x[0] > 1, jax.nn.relu, jnp.cos, x)
    fed = bucketed(lambda r: jnp.exp(r), x[:, None], x > 2)[0]
    return carry, out, many, some, fed

  key = jax.random.key(0)
  rows = {"a": jax.random.normal(key, (length,)), "b": jnp.ones((length, 2))}
  args = jnp.float32([2, 3, 3.5]), jnp.float32(1.5), rows
  closed = jax.make_jaxpr(jax.jit(step))(*args)
  found = debug._Walk().run(closed, jax.tree.leaves(args), ())
  chex.assert_trees_all_close(found, jax.tree.leaves(step(*args)), rtol=1e-6)


def test_an_overflow_alone():
  found = first_bad_operation(lambda x: jnp.exp(x) + 1, jnp.float32([1000]))
  assert found.startswith("infinity first from `exp` of float32[1] at ")
  assert found.endswith("; nothing makes NaN")


def test_masks_of_infinity_are_no_fault():
  def step(x):
    scores = jnp.where(x > 0, x, -jnp.inf)
    return jax.nn.softmax(scores) + jnp.log(-x[0])

  found = first_bad_operation(step, jnp.float32([1, -1]))
  assert found.startswith("NaN first from `log`")


def test_a_bad_state_is_named():
  state = {"head": {"kernel": jnp.float32([1, jnp.nan])}}
  found = first_bad_operation(lambda s: s, state)
  assert found == "head/kernel is not finite before it"


def test_a_step_that_is_finite_after_all():
  assert "one by one" in first_bad_operation(jnp.sin, jnp.ones(3))


def test_training_stops_at_the_operation(tmp_path):
  def loss(model, batch, key, budget):
    value, metrics = tiny.loss(model, batch, key)
    bad = jnp.log(2.5 - budget)  # the number of the step
    return value + 0 * bad, metrics

  corpus = tiny.write_corpus(tmp_path / "corpus")
  config = tiny.config(corpus, loss=loss, budget=jnp.float32)
  match = (
    r"step 4 is not finite: NaN first from `log` of float32\[\] at .*test_"
  )
  with pytest.raises(ValueError, match=match):
    train(config, out=tmp_path / "run", progress=False, debug_nans=True)
