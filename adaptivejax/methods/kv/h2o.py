# SPDX-License-Identifier: Apache-2.0
r"""H2O: keys that got little attention so far are given up.

Zhang et al., 2023, https://arxiv.org/abs/2306.14048

With a_ij the attention of query i to key j, a key has the score

    F_j = sum_{i >= j} a_ij

over all queries so far (sec. 4, local statistics).  After every step the cache
keeps the last `recent` keys and, of the others, the `heavy` ones of the highest
score, the heavy hitters, for each key head apart.  A prompt is read whole and
then cut down alike.  Positions stay those of the text.

Primitive: `attend_with_mass`, then `replace_victim` or `evict` (`nn.Evicting`).
Departs: with grouped queries, whose heads share keys, `group_reduce` says how
they vote (the paper has none); `normalise` divides F_j by the number of queries
that could see j, as kvpress does, or young keys are the first to go.
Axes: B batch, T tokens, N keys, H query heads, G key heads.
"""

import jax.numpy as jnp

from adaptivejax.core.attention import Keys, attend_with_mass
from adaptivejax.core.attention_mass import check_reduction, group_reduce
from adaptivejax.nn.evicting import (
  Evicting,
  Worth,
  newest,
)


class H2O(Evicting):
  """A look that keeps heavy hitters and the recent; see `nn.with_look`.

  Args:
    heavy: keys kept by their score (static).
    recent: last keys, kept whatever they got (static).
    normalise: compare the mean over the queries that saw a key (static).
    group_reduce: over query heads that share keys: mean, max or sum (static).

  The `Setting` shrinks both alike.
  """

  def __init__(
    self,
    heavy: int,
    recent: int,
    *,
    normalise: bool = False,
    group_reduce: str = "mean",
  ):
    if heavy < 0 or recent < 0:
      raise ValueError(f"{heavy=} and {recent=} must not be negative.")
    check_reduction(group_reduce)
    super().__init__(heavy + recent)
    self.recent, self.normalise = recent, normalise
    self.group_reduce = group_reduce

  def worth(self, q, keys: Keys, positions, score) -> Worth:
    out, mass = attend_with_mass(q, keys, positions)
    score = score + group_reduce(mass, keys.k.shape[1], self.group_reduce)
    age = newest(positions, keys) - keys.pos  # [B, G, N], 0 is the newest
    priority = score / (age + 1) if self.normalise else score
    recent = age < self.share_of(self.recent)
    priority = jnp.where(recent, jnp.inf, priority)
    return Worth(out, score, priority, self.share_of(self.capacity))
