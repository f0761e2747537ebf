# SPDX-License-Identifier: Apache-2.0
"""The subset of some parts that sums to what is wanted, found by trying all.

Axes: N items, D features, E parts, S subsets of K of them.
"""

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

MOST_SUBSETS = 1000
"""So many can be tried."""


def best_subset(
  parts: Float[Array, "E *N D"], wanted: Float[Array, "*N D"], k: int
) -> Bool[Array, "*N E"]:
  """The `k` parts whose sum is nearest to `wanted`.

  All subsets are tried, by |f - sum p|^2 = |f|^2 - 2 sum f.p + sum p.p; at ties
  the first in lexicographic order wins.
  """
  check_subsets(len(parts), k)
  parts, wanted = parts.astype(jnp.float32), wanted.astype(jnp.float32)
  count = len(parts)
  chosen = np.zeros((math.comb(count, k), count), np.float32)
  for row, subset in zip(chosen, itertools.combinations(range(count), k)):
    row[list(subset)] = 1
  along = jnp.einsum("e...d,...d,se->...s", parts, wanted, chosen)
  gram = jnp.einsum("e...d,f...d->...ef", parts, parts)
  size = jnp.einsum("se,...ef,sf->...s", chosen, gram, chosen)
  return jnp.asarray(chosen > 0)[(size - 2 * along).argmin(-1)]


def check_subsets(parts: int, k: int) -> None:
  """Raises ValueError if subsets are none, or too many to try them all."""
  if not 0 < k <= parts:
    raise ValueError(f"{k=} must be in 1..{parts}, the number of parts.")
  if math.comb(parts, k) > MOST_SUBSETS:
    raise ValueError(
      f"{k} of {parts} parts can be chosen in more than {MOST_SUBSETS} ways,"
      " too many to find the best: take fewer parts, or do without (`prior=0`)."
    )
