# SPDX-License-Identifier: Apache-2.0
"""Law: every cluster is full, and no seating of the points is nearer."""

import itertools

import numpy as np
import pytest

from adaptivejax.core.clusters import balanced_clusters


def test_no_other_seating_is_nearer_to_its_own_means():
  """Of all ways to halve eight points, by hand."""
  rng = np.random.default_rng(0)
  points = rng.normal(size=(8, 2)) + np.repeat([[0, 0], [4, 0]], 4, axis=0)
  spread = lambda half: sum(
    ((points[side] - points[side].mean(0)) ** 2).sum()
    for side in (list(half), [n for n in range(8) if n not in half])
  )
  best = min(itertools.combinations(range(8), 4), key=spread)
  found = balanced_clusters(points, 2)
  assert set(np.flatnonzero(found == found[best[0]])) == set(best)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_clusters_are_equal_however_the_points_lie(count):
  points = np.random.default_rng(1).normal(size=(12, 3)) ** 3
  points[4:] = points[3]  # many alike
  found = balanced_clusters(points, count, seed=2)
  assert (np.bincount(found, minlength=count) == 12 // count).all()


@pytest.mark.parametrize("count", [0, 5])
def test_refuses_clusters_of_different_size(count):
  with pytest.raises(ValueError, match="equal size"):
    balanced_clusters(np.zeros((12, 2)), count)
