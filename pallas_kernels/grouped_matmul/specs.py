# SPDX-License-Identifier: Apache-2.0
"""The shapes that tests, benchmarks and tuning share."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Spec:
  """y[rows, columns] = x[rows, features] w[groups, features, columns].

  `tokens` is the number of rows of an unsorted x: each is named
  rows / tokens times, as by a router that takes that many experts.
  """

  name: str
  rows: int
  features: int
  columns: int
  groups: int
  tokens: int

  def sizes(self, balanced: bool) -> np.ndarray:
    """Rows of each group: all the same, or drawn from Dirichlet(1)."""
    if balanced:
      return np.full(self.groups, self.rows // self.groups, np.int32)
    share = np.random.default_rng(0).dirichlet(np.ones(self.groups))
    sizes = np.floor(share * self.rows).astype(np.int32)
    sizes[-1] += self.rows - sizes.sum()
    return sizes

  def names(self) -> np.ndarray:
    """`rows` of an unsorted x: every token as often, in any order."""
    tokens = np.arange(self.rows, dtype=np.int32) % self.tokens
    return np.random.default_rng(1).permutation(tokens)


EXPERTS = Spec("experts", 8192, 1024, 4096, 8, tokens=4096)
"""8 large experts, two for each token: bound by the matrix units."""

MANY_EXPERTS = Spec("many experts", 8192, 2048, 1024, 64, tokens=4096)
"""64 small ones, whose 268 MB of weights bind it."""

TINY = Spec("tiny", 70, 128, 256, 4, tokens=40)
"""For the interpreter: rows are no multiple of a tile."""
