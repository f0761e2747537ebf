# SPDX-License-Identifier: Apache-2.0
"""Fewer tokens: who goes where, the tokens that are left, and the way back.

A decision is `into`, the slot that each token goes to: its own if it stays,
another's if it merges with that one, -1 if it is given up.  `settle` carries it
out: tokens that merge become a weighted mean, and those that are left move up,
in their order, so that the live ones are always the first.  How many are left
is static (then `settle` cuts), or data (then the rest of the slots is dead, and
`core.rungs` leaves it out).

A token has a size, the number of original tokens it stands for; dead slots have
size 0.  The log of the size is the bias with which its key stands for all of
them (`Keys.bias`).  Ties go to the lower slot.

Axes: B batch, N original tokens, T slots, S sources, K tokens left, D features,
W width of the metric.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.select import best

WORST = -2.0
"""Similarity of what cannot be compared, below every cosine."""


class Tokens(NamedTuple):
  """The tokens that are left of N, the live ones first.

  Attributes:
    x: f[B, T, D]; 0 in dead slots once settled.
    size: original tokens that each stands for, f32[B, T]; 0 in dead slots.
    origin: the slot that holds each original token, i32[B, N]; -1 if none.
    left: what each original token was when it was given up, f[B, N, D]; None if
      nobody asks.
  """

  x: Array
  size: Array
  origin: Array
  left: Array | None = None

  @classmethod
  def start(
    cls,
    x: Float[Array, "B N D"],
    live: Bool[Array, "B N"] | None = None,
    *,
    remember: bool = False,
  ) -> "Tokens":
    """All tokens that are there, each for itself.

    Args:
      x: tokens.
      live: those that are no padding; all if not given.
      remember: keep what is given up (static).
    """
    live = jnp.ones(x.shape[:2], bool) if live is None else live
    slot = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), live.shape)
    origin = jnp.where(live, slot, -1)
    x = jnp.where(live[..., None], x, 0)
    left = jnp.zeros_like(x) if remember else None
    return cls(x, live.astype(jnp.float32), origin, left)

  @property
  def live(self) -> Bool[Array, "B T"]:
    """Slots that hold a token."""
    return self.size > 0

  @property
  def lengths(self) -> Int[Array, " B"]:
    """Tokens left of each row."""
    return self.live.sum(1, dtype=jnp.int32)


class Match(NamedTuple):
  """Sources, the even slots, and the partner of each among the odd slots.

  Attributes:
    similarity: cosine with the partner, f32[B, S]; -inf if it has none.
    partner: slot, i32[B, S].
  """

  similarity: Array
  partner: Array


def bipartite_match(
  metric: Float[Array, "B T W"], live: Bool[Array, "B T"], *, protected: int = 0
) -> Match:
  """The odd token that is most like each even token.

  Bipartite soft matching (Bolya et al., 2023, https://arxiv.org/abs/2210.09461,
  sec. 3): every token has one partner, so no rounds are needed.

  Args:
    metric: what tokens are compared by, in direction.
    live: slots that hold a token.
    protected: the first slots neither merge nor are merged with (static).
  """
  wide = metric.astype(jnp.float32)
  power = jnp.square(wide).sum(-1, keepdims=True)
  wide = wide * jax.lax.rsqrt(jnp.maximum(power, 1e-24))
  free = live & (jnp.arange(live.shape[1]) >= protected)
  source, target = free[:, ::2], free[:, 1::2]
  cosine = jnp.einsum("bsw,btw->bst", wide[:, ::2], wide[:, 1::2])
  cosine = jnp.where(jnp.isnan(cosine), WORST, cosine)
  cosine = jnp.where(target[:, None], cosine, -jnp.inf)
  if not target.shape[1]:  # one token, nobody to merge with
    none = jnp.full(source.shape, -jnp.inf)
    return Match(none, jnp.zeros(source.shape, jnp.int32))
  best = cosine.argmax(-1).astype(jnp.int32)
  similarity = jnp.where(source, cosine.max(-1), -jnp.inf)
  return Match(similarity, 2 * best + 1)


def most_merges(tokens: int, *, protected: int = 0) -> int:
  """How many of `tokens` a match can merge; all static."""
  targets = tokens // 2 - protected // 2
  return max(0, (tokens + 1) // 2 - (protected + 1) // 2) if targets > 0 else 0


def merge_best(match: Match, merges: int, tokens: int) -> Int[Array, "B T"]:
  """The decision to merge the most similar pairs.

  Args:
    match: of sources and partners.
    merges: how many per row, or all that there are (static).
    tokens: T (static).
  """
  if not merges:
    return _merge(match, jnp.zeros(match.partner.shape, bool), tokens)
  first = best(match.similarity, merges)
  row = jnp.arange(first.shape[0])[:, None]
  chosen = jnp.zeros(match.partner.shape, bool).at[row, first].set(True)
  return _merge(match, chosen, tokens)


def merge_similar(
  match: Match, threshold: Float[Array, ""] | float, tokens: int
) -> Int[Array, "B T"]:
  """The decision to merge pairs of a cosine above `threshold` (dynamic)."""
  return _merge(match, match.similarity > threshold, tokens)


def keep_only(
  keep: Bool[Array, "B T"], live: Bool[Array, "B T"], *, fuse: bool = False
) -> Int[Array, "B T"]:
  """The decision to keep some tokens.

  Args:
    keep: those that stay, if live.
    live: slots that hold a token.
    fuse: the others become one, in the slot of the first of them; else they are
      given up (static).
  """
  keep = keep & live
  rest = live & ~keep
  other = rest.argmax(1)[:, None] if fuse else -1
  return jnp.where(keep, _slots(live), jnp.where(rest, other, -1))


def keep_all(live: Bool[Array, "B T"]) -> Int[Array, "B T"]:
  """The decision to change nothing."""
  return jnp.where(live, _slots(live), -1)


def settle(
  tokens: Tokens,
  into: Int[Array, "B T"],
  weight: Float[Array, "B T"] | None = None,
  *,
  x: Float[Array, "B T D"] | None = None,
  count: int | None = None,
) -> Tokens:
  """Carries a decision out.

  Args:
    tokens: before it.
    into: where each token goes.
    weight: of each token in the mean of those that merge, positive; its size if
      not given.
    x: what the tokens are by now; `tokens.x` if not given, as which they are
      remembered when they are given up.
    count: tokens left of a row, at most (static): so many slots come back.  All
      T if not given.
  """
  now = tokens.x if x is None else x
  x, size, place = settle_slots(now, tokens.size, into, weight, slots=count)
  return moved(tokens, place)._replace(x=x, size=size)


def settle_masked(tokens, into, weight=None, *, x=None, count=None) -> Tokens:
  """The dense twin of `settle`: same arguments, all slots come back."""
  del count
  now = tokens.x if x is None else x
  x, size, place = settle_slots(now, tokens.size, into, weight)
  return moved(tokens, place)._replace(x=x, size=size)


def settle_slots(
  x: Float[Array, "B T D"],
  size: Float[Array, "B T"],
  into: Int[Array, "B T"],
  weight: Float[Array, "B T"] | None = None,
  *,
  slots: int | None = None,
) -> tuple[Float[Array, "B K D"], Float[Array, "B K"], Int[Array, "B T"]]:
  """`(x, size, place)` after a decision: `place` is each token's new slot.

  Args:
    x, size: of the tokens.
    into, weight: as in `settle`.
    slots: K, not less than are left of any row (static); T if not given.

  A token that nobody joins comes through bit by bit.
  """
  slots = x.shape[1] if slots is None else slots
  weight = size if weight is None else weight
  weight = jnp.maximum(weight.astype(jnp.float32), 1e-30)
  goes = (size > 0) & (into >= 0)
  place = jnp.cumsum(goes & (into == _slots(goes)), 1, dtype=jnp.int32) - 1
  total = _added(jnp.where(goes, weight, 0), jnp.where(goes, into, -1))
  of = lambda a: jnp.take_along_axis(a, jnp.maximum(into, 0), axis=1)
  place, total = jnp.where(goes, of(place), -1), of(total)
  part = weight / jnp.where(total > 0, total, 1)
  share = jnp.where(goes & (total != weight), part, 1)
  wide = jnp.where(goes[..., None], x, 0).astype(jnp.float32)
  mean = _added(wide * share[..., None], place, slots).astype(x.dtype)
  return mean, _added(jnp.where(goes, size, 0), place, slots), place


def moved(tokens: Tokens, place: Int[Array, "B T"]) -> Tokens:
  """With `origin` and `left` as of after a move; `x` is that of before."""
  at = jnp.maximum(tokens.origin, 0)
  origin = jnp.take_along_axis(place, at, axis=1)
  origin = jnp.where(tokens.origin >= 0, origin, -1)
  left = tokens.left
  if left is not None:
    gone = (tokens.origin >= 0) & (origin < 0)
    was = jnp.take_along_axis(tokens.x, at[..., None], axis=1)
    left = jnp.where(gone[..., None], was, left)
  return tokens._replace(origin=origin, left=left)


def restore(
  tokens: Tokens,
  y: Float[Array, "B T E"],
  left: Float[Array, "B N E"] | None = None,
) -> Float[Array, "B N E"]:
  """What became of every original token: unmerges, and fills in.

  Args:
    tokens: that are left.
    y: something about each of them.
    left: the same about those that were given up; 0 if not given.
  """
  at = jnp.maximum(tokens.origin, 0)
  found = jnp.take_along_axis(y, at[..., None], axis=1)
  other = jnp.zeros((), y.dtype) if left is None else left
  return jnp.where((tokens.origin >= 0)[..., None], found, other)


def _slots(live):
  return jnp.broadcast_to(
    jnp.arange(live.shape[1], dtype=jnp.int32), live.shape
  )


def _merge(match: Match, chosen, tokens: int):
  """Chosen sources go to their partners; who can do nothing stays."""
  chosen &= match.similarity > -jnp.inf
  slot = _slots(jnp.zeros((chosen.shape[0], tokens)))
  moved = jnp.where(chosen, match.partner, slot[:, ::2])
  return slot.at[:, ::2].set(moved)


def _added(a, to, slots=None):
  """Sums of what goes to each slot; -1 goes nowhere."""
  out = jnp.zeros((a.shape[0], slots or a.shape[1], *a.shape[2:]), a.dtype)
  row = jnp.arange(a.shape[0])[:, None]
  return out.at[row, jnp.where(to < 0, out.shape[1], to)].add(a, mode="drop")
