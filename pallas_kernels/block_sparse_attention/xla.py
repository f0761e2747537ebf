# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention in plain XLA: how a CPU runs it.

A step (`steps`) gathers the key blocks of its tiles and does one wide softmax,
joined to what the tile has seen before; the query heads that share a list and a
key head are one tile of more rows.  The backward pass computes the weights
again from `lse`, in the same steps, and adds the gradients of keys and values
to their blocks.  Nothing grows with T x S.

A short list costs as little as a pass over whole arrays, so there are none:
what is gathered is scaled, rid of NaN and divided by its sum in the step.

Axes: as in `types` and `steps`; of one step: M tiles, X rows of a tile, W
blocks, Y keys (W x block_kv).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.steps import Cut, Part, sweep
from pallas_kernels.block_sparse_attention.types import (
  NEVER,
  UNMARKED,
  Attended,
  BlockLists,
  Marks,
  Rule,
)

FLOOR = NEVER / 2
"""Least maximum of a row, so that exp(NEVER - maximum) is 0."""

FAR = jnp.iinfo(jnp.int32).max
"""Position of what is no key: after every query."""


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lists: BlockLists,
  marks: Marks,
  rule: Rule,
  mass: bool = False,
) -> Attended:
  """Attention of every tile over its list.

  What is not finite in `k` or `v` makes NaN of the rows that see the key only.
  """
  job = _job(q, k, v, lists, marks, rule)
  cut = job.cut

  def step(part, state):
    out, top, total = (part.take(a) for a in state)
    scores, _ = job.scores(part, job.queries(part), jnp.nan)

    def soften(scores):
      high = jnp.maximum(top, scores.max(-1))
      weights = jnp.exp(scores - high[..., None])
      return weights, high, weights.sum(-1)

    weights, high, own = job.where_seen(part, soften, scores)
    keep = jnp.exp(top - high)
    total = total * keep + own
    new = jnp.einsum("mxy,mye->mxe", weights, job.clean(part, job.v, 0))
    divisor = jnp.where(job.done(part)[:, None] & (total != 0), total, 1)
    out = (out * keep[..., None] + new) / divisor[..., None]
    return [part.put(*pair) for pair in zip(state, (out, high, total))]

  shape = job.q.shape[:2]
  start = [
    job.full((*shape, v.shape[-1]), 0),
    job.full(shape, FLOOR),
    job.full(shape, 0),
  ]
  out, top, total = job.sweep(step, start)
  empty = total == 0
  total = jnp.where(empty, 1, total)
  out = cut.untile(out)
  lse = cut.untile(jnp.where(empty, -jnp.inf, top + jnp.log(total)))
  if marks.q_pos is not None and not job.pairwise:
    dead = (marks.q_pos < 0)[:, None]
    out = jnp.where(dead[..., None], 0, out)
    lse = jnp.where(dead, -jnp.inf, lse)
  if marks.sinks is not None:
    own, sinks = lse, marks.sinks.astype(jnp.float32)[:, None]
    lse = jnp.logaddexp(own, sinks)
    keep = jnp.where(own == lse, 1, jnp.exp(own - lse))  # both may be -inf
    out = out * keep[..., None]
  given = _mass(job, _divisor(lse, marks)) if mass else None
  return Attended(out.astype(q.dtype), lse, given)


def _mass(job: "_Job", lse: jax.Array) -> jax.Array:
  """Attention of each entry, f32[B, H, Q, C]."""
  cut, capacity = job.cut, job.index.shape[1]
  lse = cut.tile(lse, -NEVER)

  def step(part, state):
    scores, _ = job.scores(part, job.queries(part), jnp.nan)
    of_lse = part.take(lse, -NEVER)[..., None]
    soften = lambda scores: jnp.exp(scores - of_lse)
    weights = job.where_seen(part, soften, scores)
    m, w = part.entry.shape
    got = weights.reshape(m, cut.repeat, cut.block_q, w, cut.block_kv)
    place = jnp.where(part.live, part.entry, capacity)
    at = state[0].at[part.item[:, None], place]
    return [at.set(jnp.swapaxes(got.sum((2, 4)), 1, 2), mode="drop")]

  (mass,) = job.sweep(step, [job.full((cut.items, capacity, cut.repeat), 0)])
  mass = mass.reshape(cut.batch, cut.units, cut.tiles, capacity, cut.repeat)
  mass = jnp.moveaxis(mass, -1, 2)
  return mass.reshape(cut.batch, cut.heads, cut.tiles, capacity)


def backward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lists: BlockLists,
  marks: Marks,
  rule: Rule,
  out: jax.Array,
  lse: jax.Array,
  dout: jax.Array,
  dlse: jax.Array,
) -> tuple[Any, ...]:
  """`(dq, dk, dv, dbias)`, the last None where there is no bias.

  A row whose `lse` is not finite gives no gradient, nor does a key that is not
  or whose value is not.  `lse` holds the sinks, whose own gradient is not made
  here.
  """
  job = _job(q, k, v, lists, marks, rule)
  cut = job.cut
  gain = jnp.einsum(  # the sum of a product is slower
    "bhte,bhte->bht", out, dout, preferred_element_type=jnp.float32
  )
  divisor = _divisor(lse, marks)
  gain = jnp.where(divisor < -NEVER, dlse - gain, 0)
  divisor = cut.tile(divisor, -NEVER)
  dout, gain = cut.tile(dout), cut.tile(gain)
  columns = lambda a: job.full((a.shape[0], a.shape[2], a.shape[1]), 0)

  def step(part, state):
    dq, dk, dv, *dbias = state
    of_lse = part.take(divisor, -NEVER)[..., None]
    live = of_lse < -NEVER
    of_gain = part.take(gain)[..., None]
    of_out = jnp.where(live, part.take(dout).astype(jnp.float32), 0)
    of_q = jnp.where(live, job.queries(part), 0)
    scores, slope = job.scores(part, of_q, 0)
    given = jnp.einsum("mxe,mye->mxy", of_out, job.clean(part, job.v, 0))

    def soften(scores):
      weights = jnp.exp(scores - of_lse)
      return weights, weights * (given + of_gain)

    weights, dscores = job.where_seen(part, soften, scores)
    new = jnp.einsum("mex,mxy->mey", _flipped(of_out), weights)
    dv = job.scatter(part, dv, new)
    if dbias:
      new = dscores.sum(1, keepdims=True)
      dbias = [job.scatter(part, dbias[0], new, job.owners)]
    if slope is not None:
      dscores = dscores * slope
    new = jnp.einsum("mdx,mxy->mdy", _flipped(of_q), dscores)
    dk = job.scatter(part, dk, new)
    new = jnp.einsum("mxy,myd->mxd", dscores, job.clean(part, job.k, 0))
    dq = part.put(dq, part.take(dq) + new * job.scale)
    return [dq, dk, dv, *dbias]

  start = [job.full(job.q.shape, 0), columns(job.k), columns(job.v)]
  if job.bias is not None:
    start.append(columns(job.bias[..., None]))
  dq, dk, dv, *dbias = job.sweep(step, start)
  rows = lambda a, owners: cut.unblock(jnp.swapaxes(a, 1, 2), owners)
  dq = cut.untile(dq).astype(q.dtype)
  dk = rows(dk, cut.groups).astype(k.dtype)
  dv = rows(dv, cut.groups).astype(v.dtype)
  if marks.kv_bias is None:
    return dq, dk, dv, None
  given = rows(dbias[0], job.owners)[..., 0]
  if marks.kv_bias.shape[1] < job.owners:
    given = given.sum(1, keepdims=True)
  return dq, dk, dv, given.astype(marks.kv_bias.dtype)


class _Job(NamedTuple):
  """The operands, cut into tiles and blocks.

  Attributes:
    q: [N, X, D].
    k, v: [B * G * K, block_kv, D or E].
    bad: keys that are not finite, or whose value is not; bool, as k without D.
    index, count: of each item, i32[N, C] and i32[N].
    rows: bool[N, C, block_q], or None.
    bias: f32[B * P * K, block_kv], or None.
    q_pos, q_segment: i32[B * Q, block_q], or None.
    kv_pos: i32[B * P * K, block_kv].
    kv_segment: i32[B * K, block_kv], or None.
    owners: P of `kv_pos` and `bias`, made one.
  """

  cut: Cut
  rule: Rule
  scale: float
  owners: int
  q: jax.Array
  k: jax.Array
  v: jax.Array
  bad: jax.Array
  index: jax.Array
  count: jax.Array
  rows: jax.Array | None
  bias: jax.Array | None
  q_pos: jax.Array
  q_segment: jax.Array | None
  kv_pos: jax.Array
  kv_segment: jax.Array | None

  def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
    """f32 of one value, of the type that `q` has inside `shard_map`."""
    return jnp.full_like(self.q, value, dtype=jnp.float32, shape=shape)

  def sweep(self, step, state):
    return sweep(self.cut, self.count, self.index.shape[1], step, state)

  def named(self, part: Part, owners: int) -> jax.Array:
    """The blocks of the step among those of some owners, i32[M, W]."""
    item = jnp.minimum(part.item, self.cut.items - 1)
    block = self.index.at[item[:, None], part.entry].get(mode="clip")
    return self.cut.base_of(item, owners)[:, None] + block

  def gather(self, part: Part, a: jax.Array, owners: int = 0) -> jax.Array:
    """Blocks of the step side by side, [M, Y, ...]."""
    block = self.named(part, owners or self.cut.groups)
    a = a.at[block].get(mode="promise_in_bounds")
    a = a.reshape(block.shape[0], -1, *a.shape[3:])
    floating = jnp.issubdtype(a.dtype, jnp.floating)
    return a.astype(jnp.float32) if floating else a

  def queries(self, part: Part) -> jax.Array:
    """Of the tiles of the step, scaled, f32[M, X, D]."""
    return part.take(self.q).astype(jnp.float32) * self.scale

  def clean(self, part: Part, a: jax.Array, bad: float) -> jax.Array:
    """Of keys or values, [M, Y, D], with one value where they are bad."""
    is_bad = self.gather(part, self.bad)[..., None]
    return jnp.where(is_bad, bad, self.gather(part, a))

  def done(self, part: Part) -> jax.Array:
    """Whether the step is a tile's last one, bool[M]."""
    count = part.take(self.count)
    return part.entry[:, -1] >= count - 1

  def scatter(
    self, part: Part, a: jax.Array, new: jax.Array, owners: int = 0
  ) -> jax.Array:
    """Adds [M, E, Y] to the blocks of the step in `a` [.., E, block_kv]."""
    block = self.named(part, owners or self.cut.groups)
    new = new.reshape(*new.shape[:2], -1, self.cut.block_kv)
    new = jnp.swapaxes(new, 1, 2)
    return a.at[block].add(new, mode="promise_in_bounds")

  def scores(
    self, part: Part, q: jax.Array, bad: float
  ) -> tuple[jax.Array, jax.Array | None]:
    """Scores of all pairs of the step, and their slope under the soft cap.

    Args:
      part: the step.
      q: its `queries`.
      bad: what stands for the features of bad keys.
    """
    scores = jnp.einsum("mxd,myd->mxy", q, self.clean(part, self.k, bad))
    slope, cap = None, self.rule.softcap
    if cap is not None:
      share = jnp.tanh(scores / cap)
      scores, slope = cap * share, 1 - share**2
    if self.bias is not None:
      scores += self.gather(part, self.bias, self.owners)[:, None]
    return scores, slope

  def where_seen(
    self, part: Part, soften: Callable[[jax.Array], Any], scores: jax.Array
  ) -> Any:
    """`soften` of the scores, those of unseen pairs made `NEVER`.

    Most steps see all of their pairs, and are spared looking at each.
    """
    pos, tile = self.positions(part), self.tile(part)

    def masked(scores):
      m, _, y = scores.shape
      seen = self.seen(part, pos, tile)
      scores = scores.reshape(m, self.cut.repeat, self.cut.block_q, y)
      scores = jnp.where(seen[:, None], scores, NEVER)
      return soften(scores.reshape(m, -1, y))

    first, last = pos.min(-1), pos.max(-1)
    every = last < FAR
    if self.pairwise:
      at = self.q_pos[tile]
      every &= at.min(-1) >= (last if self.rule.causal else 0)
      if self.rule.window is not None:
        every &= first > at.max(-1) - self.rule.window
    if self.q_segment is not None or self.rows is not None:
      every &= False
    nobody = part.item >= self.cut.items  # dropped, or of no weight
    return lax.cond((every | nobody).all(), soften, masked, scores)

  def tile(self, part: Part) -> jax.Array:
    """Where the marks of the queries of the step are, i32[M]."""
    return self.cut.tile_of(jnp.minimum(part.item, self.cut.items - 1))

  def positions(self, part: Part) -> jax.Array:
    """Positions of the keys of the step, `FAR` for none, i32[M, Y]."""
    m, w = part.entry.shape
    pos = self.gather(part, self.kv_pos, self.owners).reshape(m, w, -1)
    return jnp.where(part.live[..., None], pos, FAR).reshape(m, -1)

  def seen(self, part: Part, pos: jax.Array, tile: jax.Array) -> jax.Array:
    """Which rows see which keys, bool[M, block_q or 1, Y]."""
    rule, pos = self.rule, pos[:, None]
    if not self.pairwise:
      return pos < FAR
    at = self.q_pos[tile][..., None]  # [M, block_q, 1]
    seen = pos <= at if rule.causal else (pos < FAR) & (at >= 0)
    if rule.window is not None:
      seen &= pos > at - rule.window
    if self.q_segment is not None and self.kv_segment is not None:
      same = self.gather(part, self.kv_segment, 1)[:, None]
      seen &= self.q_segment[tile][..., None] == same
    if self.rows is not None:
      item = jnp.minimum(part.item, self.cut.items - 1)
      rows = self.rows.at[item[:, None], part.entry].get(mode="clip")
      rows = jnp.swapaxes(rows, 1, 2)
      seen &= jnp.repeat(rows, self.cut.block_kv, axis=2)
    return seen

  @property
  def pairwise(self) -> bool:
    """Whether rows of a tile may see different keys of a block."""
    by_position = self.rule.causal or self.rule.window is not None
    return by_position or not (self.q_segment is None and self.rows is None)


def _job(q, k, v, lists, marks, rule) -> _Job:
  batch, heads, queries, width = q.shape
  groups, keys = k.shape[1:3]
  owning = lists.index.shape[1]
  units = heads if owning == heads else groups
  cut = Cut(
    batch, heads, groups, units, queries, keys, lists.block_q, lists.block_kv
  )
  spread = lambda a: jnp.broadcast_to(a, (batch, units, *a.shape[2:])).reshape(
    cut.items, *a.shape[3:]
  )
  index = jnp.clip(lists.index, 0, cut.blocks - 1)
  count = jnp.clip(lists.count, 0, index.shape[-1])
  scale = width**-0.5 if rule.scale is None else rule.scale
  q_pos = marks.q_pos
  if q_pos is None:
    q_pos = jnp.broadcast_to(jnp.arange(queries), (batch, queries))
  kv_pos = marks.kv_pos
  if kv_pos is None:
    kv_pos = jnp.broadcast_to(jnp.arange(keys), (batch, 1, keys))
  kv_pos = jnp.where(kv_pos < 0, FAR, kv_pos)
  owners, bias = kv_pos.shape[1], marks.kv_bias
  if bias is not None:
    owners = max(owners, bias.shape[1])
    widen = lambda a: jnp.broadcast_to(a, (batch, owners, keys))
    kv_pos, bias = widen(kv_pos), cut.block(widen(bias).astype(jnp.float32))
  return _Job(
    cut=cut,
    rule=rule,
    scale=scale,
    owners=owners,
    q=cut.tile(q),
    k=cut.block(k),
    v=cut.block(v),
    bad=cut.block(_bad(k) | _bad(v)),
    index=spread(index),
    count=spread(count),
    rows=None if lists.rows is None else spread(lists.rows),
    bias=bias,
    q_pos=cut.tile_marks(q_pos, -1),
    q_segment=None
    if marks.q_segment is None
    else cut.tile_marks(marks.q_segment, -1),
    kv_pos=cut.block(kv_pos, FAR),
    kv_segment=None
    if marks.kv_segment is None
    else cut.block(marks.kv_segment[:, None], -1),
  )


def _bad(a: jax.Array) -> jax.Array:
  """Vectors [..., D] that are not finite: 0 times them is not 0."""
  zero = jnp.zeros(a.shape[-1:], a.dtype)
  return jnp.einsum("bgsd,d->bgs", a, zero) != 0


def _flipped(a: jax.Array) -> jax.Array:
  """[M, X, E] -> [M, E, X], in memory.

  A product that sums over rows is slow unless its left side lies so, and XLA
  would rather turn the larger side.
  """
  return lax.optimization_barrier(jnp.swapaxes(a, 1, 2))


def _divisor(lse: jax.Array, marks: Marks = UNMARKED) -> jax.Array:
  """`lse`, but so high that every weight is 0 for a row without any."""
  live = jnp.isfinite(lse)
  if marks.q_pos is not None:
    live &= (marks.q_pos >= 0)[:, None]
  return jnp.where(live, lse, -NEVER)
