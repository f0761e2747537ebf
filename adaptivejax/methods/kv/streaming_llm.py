# SPDX-License-Identifier: Apache-2.0
r"""StreamingLLM: the first few keys and the last ones, whatever the length.

Xiao et al., 2023, https://arxiv.org/abs/2309.17453

A query sees the first n tokens, the attention sinks, where softmax leaves what
it has no use for, and a window of the last w tokens, its own included.
Positions are those in the cache (sec. 3.2): keys are cached without, and what
is kept counts 0, 1, .., n + w - 1 when it is read.  So neither memory nor
positions grow with the text.

Primitive: `replace_victim`, the oldest key but for the sinks; for prompts
`scan_chunks` and `evict`.
Departs: the prompt, too, is read through sinks and window, each token as if it
were decoded, so that it does not matter how a text is cut into calls; a cache
reads long prompts in chunks, each at n + w keys and its own.
Axes: B batch, T tokens, N keys, H query heads, G key heads, W head width.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys, attend, rotary, turn
from adaptivejax.core.cache import KVCache, put
from adaptivejax.core.eviction import best, candidates, evict, replace_victim
from adaptivejax.core.token_chunks import chunk_sizes, scan_chunks
from adaptivejax.nn.look import Look, Looked, look_cost
from adaptivejax.nn.setting import Setting


class StreamingLLM(Look):
  """A look at sinks and a window; see `nn.with_look`.

  Args:
    sinks: n, first tokens that stay (static).
    window: w, last tokens that stay (static).
    chunk: tokens of a prompt that are read at once (static).

  The `Setting` is the share of the window that is not used, 1 leaves the token
  itself.
  """

  rotated = False
  evicts = True

  def __init__(self, sinks: int = 4, window: int = 512, *, chunk: int = 256):
    if sinks < 0 or min(window, chunk) < 1:
      raise ValueError(
        f"{sinks=} must not be negative, {window=} and {chunk=} at least 1."
      )
    self.sinks, self.window, self.chunk = sinks, window, chunk
    self.level = Setting(jnp.zeros(()))

  def span(self) -> Int[Array, ""]:
    """Tokens of the window that are used, at least one."""
    left = jnp.round(self.window * (1 - self.level.get_value()))
    return jnp.maximum(left, 1).astype(jnp.int32)

  def slots(self, slots: int) -> int:
    return min(slots, self.sinks + self.window)

  def __call__(
    self, q, keys: Keys, positions, layer=0, *, x=None, live=None, mask=None,
    key=None,
  ) -> Looked:  # fmt: skip
    del layer, x, key
    seen = self.sees(keys.pos, positions)
    seen = seen if mask is None else seen & mask
    out = attend(*self.placed(q, keys, positions), positions, mask=seen)
    cost = look_cost(q, keys.k.shape[2], live)
    if q.shape[1] > 1:  # heads are twice as wide, see `placed`
      cost = cost.with_overhead(cost.full / 2)
    return Looked(out, cost)

  def step(
    self, q, keys: Keys, positions, cache: KVCache, layer=0, *, x=None,
    live=None, key=None,
  ) -> tuple[Looked, KVCache]:  # fmt: skip
    del x, key
    held, tokens = cache.read(layer), keys.k.shape[2]
    if tokens == 1:
      sink = held.pos < self.sinks
      cache, _ = replace_victim(cache, layer, keys, held.pos, sink)
      out, pairs = self(q, cache.read(layer), positions).out, cache.slots
    else:
      new = q, keys.k, keys.v, keys.pos, positions
      axes, fills = (1, 2, 2, 2, 1), (0, 0, 0, -1, -1)
      held, out = scan_chunks(self.read, held, new, axes, fills, self.chunk)
      count, size = chunk_sizes(tokens, self.chunk)
      cache = put(cache, layer, held)
      pairs = 1.5 * (cache.slots + size) * count * size / tokens  # `placed`
    full = cache.length.mean(dtype=jnp.float32) + tokens
    cost = look_cost(q, pairs, live)._replace(full=4.0 * q.size * full)
    return Looked(out, cost), cache

  def read(self, held: Keys, new) -> tuple[Keys, Array]:
    """What is held after more tokens, and what these found."""
    q, k, v, pos, positions = new
    both = candidates(held, Keys(k, v, pos))
    worth = jnp.where(both.pos < self.sinks, jnp.inf, both.pos)
    worth = jnp.where(both.pos < 0, -jnp.inf, worth)
    slots = held.pos.shape[-1]
    left = evict(both, best(worth, slots, slots))
    return left, self(q, both, positions).out

  def sees(self, pos, positions) -> Bool[Array, "B T N"]:
    """Sinks and window; one table for all heads."""
    near = pos[:, 0, None, :] > positions[:, :, None] - self.span()
    return near | (pos[:, 0, None, :] < self.sinks)

  def placed(
    self, q: Float[Array, "B T H W"], keys: Keys, positions: Int[Array, "B T"]
  ) -> tuple[Array, Keys]:
    """Queries and keys turned so that products are those by cache position.

    One query per row: keys take their rank.  More: sinks and window differ in
    the distance to a query, so each product is the sum of two, one of them 0,
    of heads twice as wide.
    """
    last = self.sinks + self.span() - 1  # the rank of a query, at most
    rank = jnp.minimum(positions, last)
    pos, sink = keys.pos, keys.pos < self.sinks
    if q.shape[1] == 1:
      shift = (positions - rank)[:, :, None]
      at = jnp.where(sink, pos, pos - shift)
      turned = keys._replace(k=self.ranked(keys.k, at))
      return rotary(q, rank, self.rope), turned
    begin = jnp.where(positions < 0, jnp.iinfo(jnp.int32).max, positions).min(1)
    begin = jnp.maximum(begin - self.window, 0)[:, None]  # keeps angles small
    far = jnp.where(sink[..., None], self.turned(keys.k, pos), 0)
    near = self.turned(keys.k, pos - begin[..., None])
    near = jnp.where(sink[..., None], 0, near)
    both = [rotary(q, at, self.rope) for at in (rank, positions - begin)]
    q, k = (jnp.concatenate(a, -1) for a in (both, [far, near]))
    return q * jnp.sqrt(2.0).astype(q.dtype), keys._replace(k=k)

  def ranked(self, k: Float[Array, "B G N W"], at: Int[Array, "B 1 N"]):
    """`turned` by places in the cache, whose angles are known beforehand."""
    table = self.rope.table(self.sinks + self.window, k.shape[-1] // 2)
    return turn(k, *(a.at[at].get(mode="clip") for a in table))

  def turned(self, k: Float[Array, "B G N W"], at: Int[Array, "B 1 N"]):
    """Keys with rotary positions, the same for all heads."""
    at = jnp.broadcast_to(at, k.shape[:3])
    return rotary(k[..., None, :], at, self.rope)[..., 0, :]
