# SPDX-License-Identifier: Apache-2.0
"""Clusters of equal size: balanced k-means, on the host.

Axes: N points, D features, K clusters.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment


def balanced_clusters(
  points: Float[np.ndarray, "N D"], count: int, *, rounds: int = 10, seed=0
) -> Int[np.ndarray, " N"]:
  """The cluster of each point: near points together, N / K in each.

  Bradley et al., 2000, "Constrained K-Means Clustering": the centres are means
  as ever, and the points are seated at them so that the sum of the squared
  distances is the least of all that fill every cluster alike.

  Args:
    points: what to sort.
    count: K, which divides N.
    rounds: most of them; it ends when no point moves.
    seed: of the points that are the first centres.

  One round takes up to N^3 steps: seconds for a thousand points.
  """
  n = len(points)
  if count < 1 or n % count:
    raise ValueError(f"{count=} clusters of equal size need to divide {n=}.")
  points = np.asarray(points, np.float64)
  first = np.random.default_rng(seed).choice(n, count, replace=False)
  centres, found = points[first], np.full(n, -1)
  for _ in range(rounds):
    far = ((points[:, None] - centres[None]) ** 2).sum(-1)
    _, seat = linear_sum_assignment(np.repeat(far, n // count, axis=1))
    moved = seat // (n // count)
    if (moved == found).all():
      break
    found = moved
    centres = np.stack([points[found == k].mean(0) for k in range(count)])
  return found.astype(np.int32)
