# SPDX-License-Identifier: Apache-2.0
r"""TokenSelect: all heads vote for the tokens that are looked at.

Wu et al., 2024, https://arxiv.org/abs/2411.02886

The first n_init tokens and the last n_local are looked at, and of those between
the k of the most votes: every query head h spends one vote,

    s_j = sum_h softmax_j (q_h . k_hj),        j in the middle

(sec. 4.2, soft vote), and all heads of all devices take the same tokens.
Queries that follow one another are alike, so a choice is used again while

    cos(q, q') >= similarity,        q' the query it was made for

(sec. 4.3, selection cache; all heads at once, for each layer apart).

Primitive: `soft_votes`, `top_k`, `decode_chosen` of tokens (`nn.Choosing`).
Departs: prompts are read densely, not in chunks that share a choice.  As in the
published code products are not divided by sqrt(W); its pairing of query heads
with key head h mod G, not h // (H/G), is not copied.
Axes: B batch, S slots, H query heads, G key heads, W head width.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from adaptivejax.core.cache import KVCache
from adaptivejax.core.plans import run_if
from adaptivejax.core.select import top_k
from adaptivejax.core.votes import cosine, soft_votes
from adaptivejax.nn.choosing import Choice, Choosing
from adaptivejax.nn.setting import Frozen


class Voted(NamedTuple):
  """The last choice that was voted on.

  Attributes:
    query: whose it was, f[B, H, W]; 0 before the first.
    chosen: tokens of the middle, bool[B, 1, S].
  """

  query: Array
  chosen: Array


class TokenSelect(Choosing):
  """A look at the tokens that heads vote for; see `nn.with_look`.

  Args:
    top_k: tokens of the middle (static).
    initial, local: first and last tokens that are always seen (static).
    similarity: from which on a choice is used again; above 1 never is.
    heads: H, which the cache of choices has to know (static); None: without.
    kernel: neighbours whose most votes a token gets, odd (static).
    axis_name: mesh axis of `jax.shard_map` over which heads are spread.

  The `Setting` is the share of the k that is not used.
  """

  def __init__(
    self,
    top_k: int = 2048,
    *,
    initial: int = 128,
    local: int = 512,
    similarity: float = 0.9,
    heads: int | None = None,
    kernel: int = 1,
    axis_name: str | None = None,
  ):
    if initial < 0 or local < 1 or top_k < 1 or kernel < 1 or kernel % 2 == 0:
      raise ValueError(
        f"{initial=} must not be negative, {local=} and {top_k=} at least 1,"
        f" and {kernel=} odd."
      )
    super().__init__(initial + top_k + local)
    self.initial, self.local, self.top_k = initial, local, top_k
    self.heads, self.kernel, self.axis_name = heads, kernel, axis_name
    self.similarity = Frozen(jnp.float32(similarity))

  def memory(self, batch, heads, slots, width, dtype) -> Voted | None:
    if self.heads is None:
      return None
    query = jnp.zeros((batch, self.heads, width), dtype)
    return Voted(query, jnp.zeros((batch, 1, slots), bool))

  def choose(self, q, cache: KVCache, layer) -> Choice:
    slot, now = jnp.arange(cache.slots), cache.length[:, None, None]
    there = cache.read(layer).pos[:, :1] >= 0
    keep = self.share_of(self.top_k, 0)
    few = now < self.initial + keep + self.local  # all are seen: no election
    ends = (slot < self.initial) | (slot > now - self.local)
    layer, last = jnp.asarray(layer), self._remembered(q, cache, layer)
    alike = cosine(q, last.query, self.axis_name)[:, None, None]
    again = few | (alike >= self.similarity.get_value())

    def elect(before, q, cache, layer, middle, keep):
      how = {"kernel": self.kernel, "axis_name": self.axis_name}
      votes = soft_votes(q, cache.read(layer).k, middle, **how)
      best = top_k(votes, jnp.broadcast_to(keep, votes.shape[:2]))
      return best, before[1] + 2.0 * q.size * cache.slots

    start = last.chosen, jnp.float32(0)
    asked = q, cache, layer, there & ~ends
    elected, spent = run_if(~again.all(), elect, start, *asked, keep)
    chosen = jnp.where(again, last.chosen, elected)
    mask, memory = there & (few | ends | chosen), None
    if self.heads is not None:
      query = jnp.where(again, last.query, q.astype(last.query.dtype))
      memory = Voted(query, chosen)
    return Choice(mask, spent, memory, most=2.0 * q.size * cache.slots)

  def _remembered(self, q, cache, layer) -> Voted:
    if self.heads is not None:
      return cache.recollect(layer)
    return Voted(jnp.zeros_like(q), jnp.zeros((len(q), 1, cache.slots), bool))
