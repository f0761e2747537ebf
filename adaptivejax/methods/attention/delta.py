# SPDX-License-Identifier: Apache-2.0
r"""DELTA: a few layers look at all keys and choose the pages for the others.

Zarch et al., 2025, https://arxiv.org/abs/2510.09883

Layers of three kinds (sec. 3).  Full ones look at all keys; the last full one
before a run of sparse layers, the Delta layer, also gives each page P the mass

    s_P = sum_{j in P} max_h a_hj,        a_hj the attention of head h to key j,

and the sparse layers look at the pages of the most mass and at the last few.
This is done anew for every token, and no key is given up.

Primitive: `decode_chosen` with its mass, twice (`nn.Choosing`); the choice goes
from layer to layer in the cache, where layer l reads that of layer l - 1.
Departs: nothing is known of ties in the paper; the lower page wins, as in the
published code.
Axes: B batch, S slots, N pages, H query heads.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from adaptivejax.core.attention_mass import group_reduce
from adaptivejax.core.cache import KVCache
from adaptivejax.core.page_scores import (
  best_pages,
  page_count,
  pages_there,
  pages_within,
  sum_pages,
)
from adaptivejax.nn.choosing import Choice, Choosing


class DELTA(Choosing):
  """A look at pages that an earlier layer chose; see `nn.with_look`.

  Args:
    full: layers that look at all keys, the first among them; those of the
      published code are for 28 layers (static).
    pages: that sparse layers look at (static).
    page: tokens of a page (static).
    recent: last pages, always among them (static).
    axis_name: mesh axis of `jax.shard_map` over which heads are spread.

  The `Setting` is the share of the pages that is not used; the recent stay.
  """

  weighs = True

  def __init__(
    self,
    full: tuple[int, ...] = (0, 1, 2, 14, 22),
    *,
    pages: int = 64,
    page: int = 16,
    recent: int = 8,
    axis_name: str | None = None,
  ):
    if 0 not in full or min(full) < 0:
      raise ValueError(
        f"{full=} must name layers, and layer 0 among them: none comes before"
        " it that could choose its pages."
      )
    if not 1 <= recent <= pages:
      raise ValueError(f"{recent=} must lie in 1..{pages=}.")
    super().__init__(pages, page)
    self.full, self.recent, self.axis_name = tuple(full), recent, axis_name

  def memory(self, batch, heads, slots, width, dtype) -> Bool[Array, "B 1 N"]:
    del heads, width, dtype
    return jnp.zeros((batch, 1, page_count(slots, self.unit)), bool)

  def looks_at_all(self, layer: Int[Array, ""] | int) -> Bool[Array, ""]:
    """Whether a layer (dynamic) is a full one."""
    return (jnp.asarray(self.full) == layer).any()

  def choose(self, q, cache: KVCache, layer) -> Choice:
    del q
    before = cache.recollect(jnp.maximum(jnp.asarray(layer) - 1, 0))
    mask = before | self._recent(cache, before.shape[2])
    return Choice(mask | self.looks_at_all(layer), memory=before)

  def learn(self, choice: Choice, mass, cache: KVCache, layer):
    most = group_reduce(mass, 1, "max", self.axis_name)
    score = sum_pages(most, self.unit)
    there = pages_there(cache.read(layer).pos, self.unit)
    recent = self._recent(cache, score.shape[2])
    best = best_pages(score, self.share_of(self.capacity), there, recent)
    return jnp.where(self.looks_at_all(layer), best, choice.memory)

  def _recent(self, cache: KVCache, count: int) -> Bool[Array, "B 1 N"]:
    first = cache.length - (self.recent - 1) * self.unit
    return pages_within(first, cache.length, self.unit, count)
