# SPDX-License-Identifier: Apache-2.0
"""Which expert gets which item: assignments sorted by expert, and capacity.

A router says for each item which experts it wants and with what weight.
`dispatch` sorts these choices by expert, dropless: no expert has a limit.  A
capacity is a selection on top of it (`within_capacity`), and therefore data:
the choices that an expert has no room for are marked as no choice.

Axes: N items, K choices per item, E experts, M = N K slots.
"""

from numbers import Integral
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.select import compact

NOBODY = -1
"""The expert of a choice that is none."""


class Dispatch(NamedTuple):
  """Slots sorted by expert: slot m runs item `item[m]`.

  The first `sizes[0]` slots are expert 0's, the next `sizes[1]` expert 1's; the
  slots past `sizes.sum()` are nobody's, whatever they hold.

  Attributes:
    item: i32[M], within 0..N-1.
    weight: of what the expert makes of it, f[M].
    sizes: slots of each expert, i32[E].
    place: the slots of each item, i32[N, K], if that is known; from
      `sizes.sum()` on they are nobody's.  With it a sum by item gathers, where
      without it scatters, which on a TPU takes nine times as long.
  """

  item: Array
  weight: Array
  sizes: Array
  place: Array | None = None

  def cotangent(self, weight: Array) -> "Dispatch":
    """What a backward pass says of a plan: only weights carry a gradient."""
    none: Any = None
    return Dispatch(none, weight, none)

  @property
  def valid(self) -> Bool[Array, " M"]:
    """Slots that are somebody's."""
    return jnp.arange(self.item.shape[0]) < self.sizes.sum()

  @property
  def expert(self) -> Int[Array, " M"]:
    """The expert of each slot; E - 1 past the last."""
    m, ends = self.item.shape[0], jnp.cumsum(self.sizes)
    begins = jnp.zeros(m + 1, jnp.int32).at[ends[:-1]].add(1)
    return jnp.cumsum(begins[:m], dtype=jnp.int32)


def dispatch(
  experts: Int[Array, "..."],
  weights: Float[Array, "..."],
  count: int,
  *,
  most: int | None = None,
) -> Dispatch:
  """Sorts the choices of all items by expert, items in order within each.

  Args:
    experts: chosen experts, distinct within an item, i32[*N, K]; NOBODY (-1) is
      no choice (dynamic), so that K may exceed E.
    weights: of the choices, f[*N, K]; they carry the router's gradient.
    count: E (static).
    most: choices that are not NOBODY, at most (static): a promise by which a
      plan, and what is kept for its gradient, is of M = `most` slots.  More are
      dropped, those of the last experts first.

  Returns:
    The dispatch of M = N K slots; all leading axes are item axes.
  """
  if not jnp.issubdtype(experts.dtype, jnp.integer):
    raise ValueError(f"`experts` must be integers; got {experts.dtype}.")
  if experts.shape != weights.shape or experts.ndim < 2:
    raise ValueError(
      "`experts` and `weights` must both be [*items, choices]; got"
      f" {experts.shape} and {weights.shape}."
    )
  check_count(count, 1)
  flat = experts.reshape(-1)
  flat = jnp.where((flat >= 0) & (flat < count), flat, count)
  order = jnp.argsort(flat, stable=True).astype(jnp.int32)
  place = inverse(order).reshape(-1, experts.shape[-1])
  sizes = expert_load(experts, count)
  if most is not None and most < flat.size:
    if most < 0:
      raise ValueError(f"{most=} choices: there must be at least 0.")
    order = order[:most]
    sizes = jnp.diff(jnp.minimum(jnp.cumsum(sizes), most), prepend=0)
  weight = weights.reshape(-1).at[order].get(mode="promise_in_bounds")
  return Dispatch(order // experts.shape[-1], weight, sizes, place)


def inverse(order: Int[Array, " M"]) -> Int[Array, " M"]:
  """Where a permutation puts each: `inverse(order)[order[m]] = m`."""
  place = jnp.arange(order.size, dtype=jnp.int32)
  return jnp.zeros_like(place).at[order].set(place, unique_indices=True)


def dispatch_mask(
  mask: Bool[Array, "N E"], weights: Float[Array, "N E"]
) -> Dispatch:
  """The dispatch of a matrix of choices, item by expert, without a sort.

  For rules that choose any number of experts; equals `dispatch` of them.

  Args:
    mask: who runs what (dynamic).
    weights: of the choices; those of others are not read.

  Returns:
    The dispatch of N E slots.
  """
  if mask.shape != weights.shape or mask.ndim != 2:
    raise ValueError(
      "`mask` and `weights` must both be [items, experts]; got"
      f" {mask.shape} and {weights.shape}."
    )
  n = mask.shape[0]
  order, _ = compact(mask.T.reshape(-1))
  weight = weights.at[order % n, order // n].get(mode="promise_in_bounds")
  return Dispatch(order % n, weight, mask.sum(0, dtype=jnp.int32))


def expert_load(experts: Int[Array, "..."], count: int) -> Int[Array, " E"]:
  """Choices that each of `count` experts got: what balance rules look at."""
  each = jnp.arange(count, dtype=jnp.int32)
  return (experts.reshape(-1, 1) == each).sum(0, dtype=jnp.int32)


def no_drop_capacity(experts: Int[Array, "..."], count: int) -> Int[Array, ""]:
  """The least capacity that drops nothing: the load of the fullest expert.

  It never exceeds the number of items, since an item's choices are distinct:
  that is the bound that is known before the router has spoken.
  """
  return expert_load(experts, count).max()


def within_capacity(
  experts: Int[Array, "*N K"],
  count: int,
  capacity: Int[Array | np.ndarray, ""] | Int[Array | np.ndarray, " E"] | int,
  priority: Float[Array, "*N"] | None = None,
) -> Bool[Array, "*N K"]:
  """The choices that are served if each expert takes at most `capacity`.

  First choices come before second ones (GShard, 2020); among equals the items
  of higher `priority` come first (batch-prioritized routing, Riquelme et al.,
  2021), or else, and at ties, the earlier ones.

  Args:
    experts: as for `dispatch`.
    count: E (static).
    capacity: choices that each expert takes, at least 0: one number, or one of
      each (dynamic).
    priority: of each item, such as its largest gate.

  Returns:
    True for what is served; False where nothing was chosen.

  Raises:
    ValueError: a capacity known beforehand is negative.
  """
  if isinstance(capacity, int | np.ndarray) and np.min(capacity) < 0:
    raise ValueError(f"{capacity=} must be at least 0 for each expert.")
  *lead, k = experts.shape
  flat = experts.reshape(-1, k)
  n = flat.shape[0]
  turn = jnp.arange(n, dtype=jnp.int32)
  if priority is not None:
    first = -priority.reshape(-1).astype(jnp.float32)
    turn = turn.at[jnp.argsort(first, stable=True)].set(turn)
  queue = jnp.zeros((k, n), jnp.int32).at[:, turn].set(flat.T).reshape(-1)
  queue = jnp.where((queue >= 0) & (queue < count), queue, count)
  order = jnp.argsort(queue, stable=True)
  sizes = expert_load(queue, count + 1)
  begin = jnp.cumsum(sizes) - sizes
  rank = jnp.zeros(n * k, jnp.int32).at[order].set(jnp.arange(n * k))
  rank = rank - begin[queue]
  room = jnp.zeros(count + 1, jnp.int32).at[:count].set(capacity)
  served = rank < room[queue]
  return served.reshape(k, n)[:, turn].T.reshape(*lead, k)


def check_count(count: int, choices: int) -> None:
  """Raises ValueError unless `choices` different ones of `count` exist."""
  whole = isinstance(count, Integral) and isinstance(choices, Integral)
  if not whole or count < 1 or not 1 <= choices <= count:
    raise ValueError(
      f"{choices} different choices cannot be made among {count} experts: the"
      " experts chosen must be a whole number, at least 1 and at most as many"
      " as there are."
    )
