# SPDX-License-Identifier: Apache-2.0
"""How `expert_apply_parallel` runs: its exchanges and its gradient.

One exchange packs up to C items for each device, sends them, runs
`expert_apply` on what arrived, and sends the sums back.  The fullest
destination says how many there are, and on all devices the same: that is what
makes it legal to hold collectives in a conditional and a loop.

The backward pass sends the inputs again: what arrives at a device has no bound
that is known before, so it cannot be kept.

Axes: N items of this device, K choices per item, J of them at one device, G
devices, L experts of this device, C rows from one device to another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.covers import Cover
from adaptivejax.core.dispatch import NOBODY, dispatch
from adaptivejax.core.experts import expert_apply
from adaptivejax.core.marks import marked
from adaptivejax.core.rowwise import (
  RowFunction,
  differentiable,
  merge,
  with_none,
)
from adaptivejax.core.select import compact
from adaptivejax.core.varying import vary, varying_axes

Axis = str | tuple[str, ...]


class Layout(NamedTuple):
  """Where the experts are; all static.

  Attributes:
    axis: mesh axes that they are spread over.
    groups: G, its devices.
    local: L.
    chunks: independent parts of an exchange.
    axes: mesh axes over which anything differs.
    asked: rows that a device computes where the load is even.
  """

  axis: Axis
  groups: int
  local: int
  chunks: int
  axes: frozenset[str]
  asked: int


class Queue(NamedTuple):
  """The items that go to each device: `order[g, :count[g]]`."""

  order: Int[Array, "G M"]
  count: Int[Array, " G"]

  @classmethod
  def of(cls, experts: Int[Array, "N K"], at: Layout, most: int) -> "Queue":
    """Items in order; slices of up to `most` from within them never clamp."""
    device = home(experts, at.local)[..., None] == jnp.arange(at.groups)
    order, count = jax.vmap(compact, 1)(device.any(1))
    return cls(jnp.pad(order, ((0, 0), (0, most))), count)


class Parcel(NamedTuple):
  """What one exchange takes from this device to each.

  Attributes:
    item: i32[G, C]; padding repeats one of those that go.
    live: what is not padding, bool[G, C].
    pick: choices that are for the destination, i32[G, C, J].
    expert: theirs, counted there, or NOBODY, i32[G, C, J].
  """

  item: Array
  live: Array
  pick: Array
  expert: Array

  @classmethod
  def pack(cls, experts, queue: Queue, at: Layout, begin, size: int):
    """The next `size` items of each queue, from `begin` on."""
    item = lax.dynamic_slice_in_dim(queue.order, begin, size, axis=1)
    live = begin + jnp.arange(size, dtype=jnp.int32) < queue.count[:, None]
    chosen = experts.at[item].get(mode="promise_in_bounds")
    there = jnp.arange(at.groups, dtype=jnp.int32)[:, None, None]
    mine = live[..., None] & (home(chosen, at.local) == there)
    most = min(experts.shape[1], at.local)  # choices are distinct
    mine, pick = lax.top_k(mine.astype(jnp.int32), most)
    chosen = jnp.take_along_axis(chosen, pick, -1) % at.local
    return cls(item, live, pick, jnp.where(mine > 0, chosen, NOBODY))

  def take(self, a: Float[Array, "N ..."]) -> Float[Array, "G C ..."]:
    """The rows of its items."""
    return a.at[self.item].get(mode="promise_in_bounds")

  def weight(self, weights: Float[Array, "N K"]) -> Float[Array, "G C J"]:
    """Of the choices that go along."""
    return jnp.take_along_axis(self.take(weights), self.pick, -1)

  def to(self, n: int) -> Int[Array, "G C"]:
    """The item of each row; `n`, which is none, for padding."""
    return jnp.where(self.live, self.item, n)


def home(experts: Array, local: int) -> Array:
  """The device of each choice, NOBODY's of none."""
  return jnp.where(experts >= 0, experts // local, NOBODY)


def _exchange(
  f: RowFunction, at: Layout, cover: Cover, own: int, together
) -> Callable:
  """`(rows [G, C, ...], weight, expert, theta) -> (sums, slots)`."""
  send = lambda a: lax.all_to_all(a, at.axis, 0, 0, tiled=True)
  fold = lambda a: a.reshape(-1, *a.shape[2:])

  def compute(rows, weight, expert, theta):
    params, shared = theta[:own], theta[own:]
    plan = dispatch(fold(expert), fold(weight), at.local)
    apply = lambda r, p: f.apply([r], [*p, *shared])[0]
    y, cost = expert_apply(
      apply, fold(rows), plan, params, together=together, cover=cover
    )
    return y.reshape(*rows.shape[:2], *y.shape[1:]), cost.capacity

  def run(rows, weight, expert, theta):
    split = lambda a: jnp.split(a, at.chunks, axis=1)
    parts = zip(split(rows), split(weight), split(expert))
    arrived = [[send(a) for a in part] for part in parts]
    with marked(asked=at.asked // at.chunks):
      made = [compute(r, w, e, theta) for r, w, e in arrived]
    sums = jnp.concatenate([send(y) for y, _ in made], axis=1)
    return vary(sums, at.axes), sum(slots for _, slots in made)

  return run


def executor(
  f: RowFunction,
  at: Layout,
  capacity: Cover,
  cover: Cover,
  own: int,
  together: Callable[..., Array] | None = None,
) -> Callable:
  """`(theta, x, weights, experts, queue, trips) -> (y, slots)`, and gradient.

  Args:
    f: row-wise; the first `own` leaves of theta are the experts' parameters.
    at: where the experts are.
    capacity: sizes of one exchange; `trips` says how often each takes place.
    cover: chunk sizes for the rows of one expert.
    together: as in `expert_apply`, of those leaves as a list.
  """
  (out,) = f.out_avals
  wide = jnp.promote_types(out.dtype, jnp.float32)  # a sum over devices
  exchange = _exchange(f, at, cover, own, together)
  zeros = lambda shape, dtype: vary(jnp.zeros(shape, dtype), at.axes)
  total = lambda a: zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))
  narrow = lambda total, a: total.astype(a.dtype)

  def value(theta, x, weights, experts, queue, trips):
    def step(begin, size, state):
      y, slots = state
      parcel = Parcel.pack(experts, queue, at, begin, size)
      rows, weight = parcel.take(x), parcel.weight(weights)
      sums, more = exchange(rows, weight, parcel.expert, theta)
      y = y.at[parcel.to(len(x))].add(sums.astype(wide), mode="drop")
      return y, slots + more

    none = vary(jnp.zeros((), jnp.float32), varying_axes(experts))
    start = zeros((len(x), *out.shape[1:]), wide), none
    y, slots = _rounds(capacity, trips, step, start)
    return y.astype(out.dtype), slots

  def backward(residuals, cotangents):
    theta, x, weights, experts, queue, trips = residuals
    dy = cotangents[0]

    def step(begin, size, state):
      dx, dweights, dtheta = state
      parcel = Parcel.pack(experts, queue, at, begin, size)
      apply = lambda rows, weight, moving: exchange(
        rows, weight, parcel.expert, merge(moving, theta)
      )
      rows, weight = parcel.take(x), parcel.weight(weights)
      _, pull, _ = jax.vjp(
        apply, rows, weight, differentiable(theta), has_aux=True
      )
      live = parcel.live.reshape(*parcel.live.shape, *[1] * (dy.ndim - 1))
      drows, dweight, d = pull(jnp.where(live, parcel.take(dy), 0))
      to = parcel.to(len(x))
      add = lambda a, at, b: a.at[at].add(b.astype(a.dtype), mode="drop")
      dx = add(dx, to, drows)
      dweights = add(dweights, (to[..., None], parcel.pick), dweight)
      return dx, dweights, [a + b.astype(a.dtype) for a, b in zip(dtheta, d)]

    moving = differentiable(theta)
    start = total(x), total(weights), [total(a) for a in moving]
    dx, dweights, dtheta = _rounds(capacity, trips, step, start)
    dtheta = with_none([narrow(d, a) for d, a in zip(dtheta, moving)], theta)
    return dtheta, narrow(dx, x), narrow(dweights, weights), None, None, None

  run = jax.custom_vjp(value)
  run.defvjp(lambda *args: (value(*args), args), backward)
  return run


def _rounds(capacity: Cover, trips, step: Callable, state: Any) -> Any:
  """Runs `step(begin, size, state)` over the capacity."""
  done = jnp.zeros((), jnp.int32)
  for size, rounds in zip(capacity.sizes, trips, strict=True):
    body = lambda i, s, size=size, done=done: step(done + i * size, size, s)
    with marked(once=size == min(capacity.sizes)):
      state = lax.cond(  # see `run_cover`
        rounds > 0,
        lambda s, n=rounds, body=body: lax.fori_loop(0, n, body, s),
        lambda s: s,
        state,
      )
    done += rounds * size
  return state
