# SPDX-License-Identifier: Apache-2.0
"""Law: rows go to slots and come back as a sum over each item's slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.combine import combine, spread
from adaptivejax.core.dispatch import NOBODY, dispatch

N, K, E, D = 7, 3, 4, 5
RNG = np.random.default_rng(0)
EXPERTS = np.where(
  RNG.random((N, K)) < 0.3,
  NOBODY,
  np.stack([RNG.permutation(E)[:K] for _ in range(N)]),
)
EXPERTS[2] = NOBODY
WEIGHTS = RNG.random((N, K), np.float32)
PLAN = dispatch(jnp.asarray(EXPERTS), jnp.asarray(WEIGHTS), E)
USED = int((EXPERTS >= 0).sum())
PLANS = {
  "gathers": PLAN,
  "scatters": PLAN._replace(place=None),
  "a promise": dispatch(
    jnp.asarray(EXPERTS), jnp.asarray(WEIGHTS), E, most=USED
  ),
}
close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


def matrix(plan):
  """f[N, M]: which slot is whose, without weights."""
  a = np.zeros((N, len(plan.item)), np.float32)
  for m in range(USED):
    a[plan.item[m], m] = 1
  return a


@pytest.mark.parametrize("name", PLANS)
def test_the_sum_and_its_gradients(name):
  """NaN in what is nobody's reaches nothing."""
  plan = PLANS[name]
  m = len(plan.item)
  rows = jnp.asarray(RNG.random((m, D), np.float32)).at[USED:].set(jnp.nan)
  weight = plan.weight.at[USED:].set(jnp.nan)
  dy = jnp.asarray(RNG.random((N, D), np.float32))
  run = lambda rows, w: combine(rows, plan._replace(weight=w), N, jnp.float32)
  y, pull = jax.vjp(run, rows, weight)
  drows, dweight = pull(dy)
  a, kept, w = matrix(plan), np.nan_to_num(rows), np.nan_to_num(weight)
  close(y, a @ (w[:, None] * kept))
  assert not y[2].any()
  close(drows, w[:, None] * (a.T @ dy))
  close(dweight, (kept * (a.T @ dy)).sum(1))


@pytest.mark.parametrize("name", PLANS)
def test_spread_and_its_gradient(name):
  plan = PLANS[name]
  x = jnp.asarray(RNG.random((N, D), np.float32))
  rows, pull = jax.vjp(lambda x: spread(x, plan), x)
  close(rows[:USED], np.asarray(x)[plan.item[:USED]])
  drows = jnp.ones_like(rows).at[USED:].set(jnp.nan)
  (dx,) = pull(drows)
  close(dx, (EXPERTS >= 0).sum(1, keepdims=True) * np.ones(D))


def test_sums_are_in_f32():
  """In bf16 256 and one is 256."""
  plan = dispatch(jnp.array([[0, 1, 2]]), jnp.ones((1, 3), jnp.bfloat16), 3)
  rows = jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16)
  for place in (plan.place, None):
    y = combine(rows, plan._replace(place=place), 1, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16 and y[0, 0] == 258


def test_where_it_scatters():
  """By the plan's places; not where there are many more of them than slots."""
  text = lambda plan: str(
    jax.make_jaxpr(
      lambda r: combine(r, plan, N, jnp.float32)
    )(jnp.ones((len(plan.item), D)))
  )  # fmt: skip
  assert "scatter" not in text(PLAN)
  assert "scatter" in text(PLANS["scatters"])
  few = dispatch(jnp.asarray(EXPERTS), jnp.asarray(WEIGHTS), E, most=2)
  assert "scatter" in text(few)
