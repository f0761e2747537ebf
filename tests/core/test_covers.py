# SPDX-License-Identifier: Apache-2.0
"""Law: a cover runs enough rows for every count, and none for none."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core import cheapest, coins, default_cover, ladder, tiles
from tests.core import brute

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True).map(
  sorted
)


def slots(cover, counts):
  return np.asarray(jax.jit(jax.vmap(cover.slots))(counts))


@hypothesis.settings(max_examples=12)
@hypothesis.given(SIZES)
def test_ladder_runs_the_smallest_rung_that_holds(rungs):
  counts = np.arange(2 * rungs[-1] + 2)
  want = [brute.ladder_slots(count, rungs) for count in counts]
  np.testing.assert_array_equal(slots(ladder(*rungs), counts), want)


@hypothesis.settings(max_examples=12)
@hypothesis.given(SIZES)
def test_coins_pay_as_by_hand(sizes):
  sizes = sizes[::-1]
  counts = np.arange(100)
  want = [brute.coin_slots(count, sizes) for count in counts]
  np.testing.assert_array_equal(slots(coins(*sizes), counts), want)


@hypothesis.settings(max_examples=8)
@hypothesis.given(SIZES, st.integers(0, 30))
def test_the_cheapest_is_the_least_of_all_combinations(sizes, price):
  """By trying every first chunk, again and again."""

  @functools.cache
  def least(count):
    if count <= 0:
      return 0
    return min(size + price + least(count - size) for size in sizes)

  cover = cheapest(*sizes[::-1], price=price)
  most = 2 * sizes[-1]  # beyond, the largest goes first
  counts = np.arange(most + sizes[-1] + 1)
  rounds = np.asarray(jax.jit(jax.vmap(cover.trips))(counts))
  run = rounds @ np.asarray(sizes[::-1])
  assert np.all(run >= counts) and run[0] == 0
  paid = run + price * rounds.sum(1)
  want = [least(int(count)) for count in counts[: sizes[-1] + 1]]
  np.testing.assert_array_equal(paid[: len(want)], want)


@pytest.mark.parametrize("tile", [1, 3, 8])
def test_tiles_round_up(tile):
  counts = np.arange(20)
  want = [-(-count // tile) * tile for count in counts]
  np.testing.assert_array_equal(slots(tiles(tile), counts), want)


@pytest.mark.parametrize(
  "n", [1, 2, 7, 8, 9, 32, 33, 511, 512, 521, 2048, 8192]
)
def test_default_cover(n):
  """Few bodies, whole rungs, and never more padding than its last coin."""
  cover = default_cover(n)
  assert len(cover.sizes) <= 5 and max(cover.sizes) <= min(n, 512)
  assert all(size % 8 == 0 or size == n for size in cover.sizes)
  assert list(cover.sizes) == sorted(set(cover.sizes), reverse=True)
  counts = np.arange(n + 1)
  run = slots(cover, counts)
  assert run[0] == 0 and np.all(run >= counts)
  assert np.all(run - counts <= cover.sizes[-1])
  want = [brute.coin_slots(count, cover.sizes) for count in counts]
  np.testing.assert_array_equal(run, want)


def test_trips_are_in_the_order_of_sizes():
  cover = ladder(2, 5, 9)
  assert cover.sizes == (9, 5, 2)
  np.testing.assert_array_equal(cover.trips(jnp.int32(4)), [0, 1, 0])
  np.testing.assert_array_equal(cover.trips(jnp.int32(19)), [3, 0, 0])
