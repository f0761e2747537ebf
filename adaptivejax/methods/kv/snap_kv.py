# SPDX-License-Identifier: Apache-2.0
r"""SnapKV: of a prompt, the keys stay that its last tokens look at.

Li et al., 2024, https://arxiv.org/abs/2404.14469

The queries of the last w tokens of a prompt, the window, vote for the keys
before it (sec. 4): with a_ij the attention of query i to key j,

    s_j = pool_j (mean_{i in window} a_ij),

where pooling over neighbours keeps details together.  Once the prompt is read,
each key head keeps the window and the best others, `capacity` in all; the keys
of generated tokens are added to them.

Primitive: `attention_mass` of the window, then `evict` (`nn.Evicting`); long
prompts are read by blocks (`attend_visible`).
Departs: `group_reduce` says how query heads that share keys vote (the published
code keeps other keys for each query head).  There is room for `extra` generated
tokens; beyond it the prompt's least key makes way, and then the oldest one.
Axes: B batch, T tokens, N keys, M queries of the window, H query heads, G key
heads.
"""

from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.attention_mass import (
  attention_mass,
  check_reduction,
  group_reduce,
)
from adaptivejax.core.cost import Cost
from adaptivejax.core.sparse_attention import attend_visible
from adaptivejax.nn.evicting import (
  Evicting,
  Worth,
)


class SnapKV(Evicting):
  """A look that cuts prompts down once they are read; see `nn.with_look`.

  Args:
    capacity: keys kept of a prompt, the window among them (static).
    window: last tokens of the prompt, which vote and stay (static).
    kernel: neighbours that are pooled, odd; 1 pools nothing (static).
    pooling: by their mean or their max (static).
    extra: generated tokens that there is room for besides (static).
    group_reduce: over query heads that share keys: mean, max or sum (static).
  """

  def __init__(
    self,
    capacity: int,
    *,
    window: int = 32,
    kernel: int = 5,
    pooling: Literal["mean", "max"] = "mean",
    extra: int = 256,
    group_reduce: str = "mean",
  ):
    if not 1 <= window <= capacity or kernel < 1 or kernel % 2 == 0:
      raise ValueError(
        f"{window=} must lie in 1..{capacity=}, and {kernel=} be odd."
      )
    if pooling not in ("mean", "max") or extra < 0:
      raise ValueError(f"{pooling=} must be mean or max, {extra=} at least 0.")
    check_reduction(group_reduce)
    super().__init__(capacity)
    self.window, self.kernel, self.pooling = window, kernel, pooling
    self.extra, self.group_reduce = extra, group_reduce

  def slots(self, slots: int) -> int:
    return min(slots, self.capacity + self.extra + 1)

  def worth(self, q, keys: Keys, positions, score) -> Worth:
    out, looking = attend_visible(q, keys, positions)
    room = keys.pos.shape[-1]
    if q.shape[1] == 1:  # a generated token outlives the prompt, by its age
      new = keys.pos == positions[:, None]
      score = jnp.where(new, 1.0 + keys.pos, score)
      return Worth(out, score, score, jnp.int32(room))
    voted, cost = self.votes(q, keys, positions)
    read = (positions >= 0).any(1)
    score = jnp.where(read[:, None, None], voted, score)
    keep = jnp.where(read, self.share_of(self.capacity), room)
    return Worth(out, score, score, keep, cost.spent, looking.spent)

  def votes(
    self, q, keys: Keys, positions
  ) -> tuple[Float[Array, "B G N"], Cost]:
    """The score of each key; above 1 in the window, by age."""
    many = min(self.window, positions.shape[1])
    place, at = lax.top_k(positions, many)  # the last ones; -1 if there is none
    asked = jnp.take_along_axis(q, at[..., None, None], axis=1)
    mass, cost = attention_mass(asked, keys, place)  # [B, H, N]
    mean = mass / jnp.maximum((place >= 0).sum(1), 1)[:, None, None]
    first = jnp.where(place >= 0, place, jnp.iinfo(place.dtype).max).min(1)
    before = (keys.pos >= 0) & (keys.pos < first[:, None, None])
    groups = keys.k.shape[1]
    by_head = mean.reshape(mean.shape[0], groups, -1, mean.shape[-1])
    voted = jnp.where(before[:, :, None], by_head, 0)
    pooled = self._pool(voted, keys.pos[:, :, None]).reshape(mean.shape)
    score = group_reduce(pooled, groups, self.group_reduce)
    return jnp.where(before, score, 1.0 + keys.pos), cost

  def _pool(self, score: Float[Array, "*X N"], pos: Int[Array, "*Y N"]):
    """Over neighbours in the text, which slots need not be; 0 outside."""
    order = jnp.argsort(jnp.where(pos < 0, jnp.iinfo(pos.dtype).max, pos))
    line = jnp.take_along_axis(score, order, axis=-1)
    half, many = self.kernel // 2, line.shape[-1]
    line = jnp.pad(line, [(0, 0)] * (line.ndim - 1) + [(half, half)])
    shifted = [line[..., i : i + many] for i in range(self.kernel)]
    reduce = jnp.mean if self.pooling == "mean" else jnp.max
    back = jnp.argsort(order)
    return jnp.take_along_axis(reduce(jnp.stack(shifted), 0), back, axis=-1)
