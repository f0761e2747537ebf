# SPDX-License-Identifier: Apache-2.0
"""Dispatch and capacity against a queue of choices, one after the other."""

import functools
import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivejax.core.dispatch import (
  NOBODY,
  check_count,
  dispatch,
  dispatch_mask,
  expert_load,
  no_drop_capacity,
  within_capacity,
)

# Few, as each is compiled: one item or expert, one choice, all, more, fewer.
SHAPES = [(1, 1, 1), (1, 7, 1), (6, 1, 6), (6, 12, 2), (3, 9, 3), (5, 4, 4)]


@st.composite
def choices(draw):
  """`(experts [N, K], count)`: distinct within an item, or nobody."""
  count, n, k = draw(st.sampled_from(SHAPES))
  rng = np.random.default_rng(draw(st.integers(0, 2**16)))
  picks = [rng.permutation(count)[:k] for _ in range(n)]
  absent = rng.random((n, k)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
  return np.where(absent, NOBODY, picks).astype(np.int32), count


def told(plan):
  """A plan with all that it knows, to be read on the host."""
  names = ("item", "weight", "sizes", "place", "expert", "valid")
  return {name: getattr(plan, name) for name in names}


@functools.partial(jax.jit, static_argnums=(2, 3))
def jitted_dispatch(experts, weights, count, most):
  return told(dispatch(experts, weights, count, most=most))


def plan_of(experts, weights, count, most=None):
  plan = jitted_dispatch(experts, weights, count, most)
  return SimpleNamespace(**jax.device_get(plan))


matrix_plan = jax.jit(lambda *args: told(dispatch_mask(*args)))
loads = jax.jit(expert_load, static_argnums=1)
serves = jax.jit(within_capacity, static_argnums=1)
enough_for = jax.jit(no_drop_capacity, static_argnums=1)


@given(choices())
def test_slots_are_the_choices_sorted_by_expert(case):
  experts, count = case
  weights = np.arange(experts.size, dtype=np.float32).reshape(experts.shape)
  plan = plan_of(experts, weights, count)
  wanted = [
    (e, n, weights[n, k])
    for e in range(count)
    for n in range(len(experts))
    for k in range(experts.shape[1])
    if experts[n, k] == e
  ]
  total = int(plan.sizes.sum())
  made = zip(plan.expert[:total], plan.item[:total], plan.weight[:total])
  assert [(int(e), int(n), float(w)) for e, n, w in made] == wanted
  assert np.array_equal(plan.valid, np.arange(experts.size) < total)
  assert (plan.item >= 0).all() and (plan.item < len(experts)).all()
  assert np.array_equal(plan.sizes, loads(experts, count))


@given(choices())
def test_a_matrix_is_dispatched_as_its_choices_are(case):
  experts, count = case
  mask = (experts[..., None] == np.arange(count)).any(1)
  weights = np.random.default_rng(0).random(mask.shape, np.float32)
  weights[~mask] = np.nan  # never read
  listed = np.where(mask, np.arange(count), NOBODY)
  got = SimpleNamespace(**jax.device_get(matrix_plan(mask, weights)))
  want = plan_of(listed, weights, count)
  total = int(want.sizes.sum())
  assert np.array_equal(got.sizes, want.sizes)
  assert np.array_equal(got.item[:total], want.item[:total])
  assert np.array_equal(got.weight[:total], want.weight[:total])
  assert (got.item >= 0).all() and (got.item < len(experts)).all()


@given(choices(), st.integers(0, 8), st.booleans(), st.integers(0, 99))
def test_capacity_serves_the_first_in_the_queue(case, capacity, ranked, seed):
  experts, count = case
  n, k = experts.shape
  priority = np.random.default_rng(seed).integers(0, 4, n).astype(np.float32)
  turn = sorted(range(n), key=lambda i: -priority[i]) if ranked else range(n)
  taken, wanted = [0] * count, np.zeros((n, k), bool)
  for j in range(k):
    for i in turn:
      e = experts[i, j]
      if e != NOBODY and taken[e] < capacity:
        taken[e] += 1
        wanted[i, j] = True
  served = serves(experts, count, capacity, priority if ranked else None)
  assert np.array_equal(served, wanted)


@given(choices())
def test_the_no_drop_capacity_is_the_least_that_drops_nothing(case):
  experts, count = case
  enough = int(enough_for(experts, count))
  assert enough <= len(experts)
  drops = lambda c: (
    (experts >= 0).sum() - np.asarray(serves(experts, count, c)).sum()
  )
  assert drops(enough) == 0
  assert enough == 0 or drops(enough - 1) > 0


def test_leading_axes_are_item_axes():
  experts = jnp.array([[[0, 1], [1, 0]], [[1, 2], [2, 0]]])
  flat = experts.reshape(4, 2)
  both = within_capacity(experts, 3, 1), within_capacity(flat, 3, 1)
  assert np.array_equal(both[0].reshape(4, 2), both[1])
  plans = [dispatch(e, jnp.ones(e.shape), 3) for e in (experts, flat)]
  for a, b in zip(*plans):
    assert np.array_equal(a, b)


@settings(max_examples=15)
@given(choices())
def test_place_is_where_the_choices_went(case):
  experts, count = case
  weights = np.arange(experts.size, dtype=np.float32).reshape(experts.shape)
  plan = plan_of(experts, weights, count)
  theirs = plan.place < plan.sizes.sum()
  assert np.array_equal(theirs, experts != NOBODY)
  assert np.array_equal(plan.weight[plan.place], weights)
  assert np.array_equal(plan.expert[plan.place][theirs], experts[theirs])


@settings(max_examples=15)
@given(choices(), st.sampled_from([0, 1, 5]))
def test_a_plan_of_at_most_so_many_slots(case, room):
  """Exact where the promise holds; else the last experts are cut off."""
  experts, count = case
  weights = np.arange(experts.size, dtype=np.float32).reshape(experts.shape)
  whole = plan_of(experts, weights, count)
  total = int(whole.sizes.sum())
  for most in (total + room, room):
    plan = plan_of(experts, weights, count, most)
    used = min(total, most)
    assert len(plan.item) == len(plan.weight) == min(most, experts.size)
    assert plan.sizes.sum() == used
    assert np.array_equal(plan.item[:used], whole.item[:used])
    assert np.array_equal(plan.weight[:used], whole.weight[:used])
    assert np.array_equal(plan.expert[:used], whole.expert[:used])


def test_more_choices_than_experts_if_some_are_none():
  experts = jnp.array([[NOBODY, 1, NOBODY], [1, NOBODY, 0]])
  plan = dispatch(experts, jnp.arange(6.0).reshape(2, 3), 2)
  assert plan.sizes.tolist() == [1, 2]
  assert plan.item[:3].tolist() == [1, 0, 1]
  assert plan.weight[:3].tolist() == [5.0, 1.0, 3.0]


def test_a_capacity_for_each_expert():
  experts = jnp.array([[0, 1], [1, 0], [0, 1], [2, 1]])
  served = within_capacity(experts, 3, jnp.array([2, 1, 0]))
  first = [[1, 0], [1, 0], [1, 0], [0, 0]]
  np.testing.assert_array_equal(served, np.array(first, bool))


@pytest.mark.parametrize("capacity", [-2, np.array([1, -1])])
def test_a_capacity_of_less_than_nothing(capacity):
  with pytest.raises(ValueError, match="at least 0"):
    within_capacity(jnp.zeros((2, 1), int), 2, capacity)


def test_a_promise_of_less_than_nothing():
  with pytest.raises(ValueError, match="at least 0"):
    dispatch(jnp.zeros((2, 1), int), jnp.ones((2, 1)), 2, most=-1)


@pytest.mark.parametrize(
  ("experts", "weights", "count", "says"),
  [
    (jnp.zeros((2, 1), int), jnp.zeros((2, 1)), 0, "among 0 experts"),
    (jnp.zeros((2, 1), int), jnp.zeros((2, 2)), 4, "items, choices"),
    (jnp.zeros(2, int), jnp.zeros(2), 4, "items, choices"),
  ],
)
def test_bad_input(experts, weights, count, says):
  with pytest.raises(ValueError, match=says):
    dispatch(experts, weights, count)


def test_half_a_choice():
  unchecked = inspect.unwrap(check_count)  # of the types that tests check
  with pytest.raises(ValueError, match="whole number"):
    unchecked(4, 1.5)
