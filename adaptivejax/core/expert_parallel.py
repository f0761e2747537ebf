# SPDX-License-Identifier: Apache-2.0
r"""`expert_apply_parallel`: experts spread over devices, items sent to them.

Inside `jax.shard_map` each device holds N items of its own and E / G of the
experts, G being the size of the mesh axis that the experts are spread over:

    pack the items by device -> all_to_all -> `expert_apply` -> all_to_all -> +

An item travels once to each device that holds an expert of its, with these
choices and their weights, and comes back as one weighted sum.

* Exact and dropless under any skew.  An all_to_all has a static size, C rows
  from each device to each; a cover (`core.covers`) of the fullest destination
  says which sizes are exchanged, and how often.  The default is a ladder around
  the balanced load whose top repeats, so memory is bounded, too.
* No deadlock: the fullest destination is `pmax`-ed over all devices that
  decide, so each runs the same exchanges, backward as forward; operands are
  made device-varying before (`core.varying`), so no other collective gets in.
* Only real rows are computed: padding travels, marked as nobody's.
* The backward pass saves the inputs only and sends them again.
* Under `vmap` a batch shares the sizes of its fullest example.

`lax.ragged_all_to_all` would spare the padding, but CPUs do not have it.

Axes: N items of this device, K choices per item, E experts, G devices, L = E/G
experts of this device, C rows from one device to another.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.batching import with_rule
from adaptivejax.core.cost import Cost, jaxpr_flops
from adaptivejax.core.covers import Cover, ladder
from adaptivejax.core.dispatch import NOBODY, dispatch
from adaptivejax.core.experts import expert_apply, expert_cover
from adaptivejax.core.rowwise import (
  RowFunction,
  differentiable,
  merge,
  trace_rows,
  with_none,
)
from adaptivejax.core.select import compact
from adaptivejax.core.varying import vary, varying_axes

Axis = str | tuple[str, ...]


def expert_apply_parallel(
  f: Callable[[Array, Any], Array],
  x: Float[Array, "N ..."],
  experts: Int[Array, "N K"],
  weights: Float[Array, "N K"],
  params: Any,
  *,
  axis: Axis = "expert",
  width: Axis | None = None,
  chunks: int = 1,
  capacity: Cover | None = None,
  cover: Cover | None = None,
) -> tuple[Float[Array, "N ..."], Cost]:
  """`expert_apply` inside `shard_map`, experts and items over the mesh `axis`.

  Args:
    f: row-wise, `f(rows, params of one expert) -> rows`.
    x: the items of this device, sharded over `axis` and any other data axes.
    experts: chosen of all E, distinct within an item; NOBODY (-1) for none.
    weights: of the choices.
    params: pytree whose leaves all have the leading axis L: expert e is on
      device e // L of `axis`, as `PartitionSpec(axis)` lays them out.
    axis: mesh axis, or axes, that the experts are spread over (static).
    width: mesh axis over which the hidden width inside each expert is split;
      `f` then makes a part of the sum over it (static).
    chunks: independent exchanges that each is cut into, so that one may travel
      while another is computed (static).
    capacity: cover of the rows from one device to another (static);
      `exchange_cover` if not given.
    cover: chunk sizes for the rows of one expert, as for `expert_apply`.

  Returns:
    `(y, cost)`: y as `expert_apply` makes it of these items; cost is what this
    device spent on the rows of all: `psum` it over the data axes and `axis`.

  Raises:
    ValueError: shapes or sizes do not fit, or items or `params` are the same on
      all devices of `axis` (found under `check_vma` only).
  """
  groups = lax.axis_size(axis)
  held = {a.shape[0] if a.ndim else 0 for a in jax.tree.leaves(params)}
  _check(x, experts, weights, held, chunks)
  local, (n, k) = held.pop(), experts.shape
  own = varying_axes(lax.axis_index(axis))
  _check_spread(x, params, own)
  capacity = capacity or exchange_cover(n, k, groups, chunks)
  _check_capacity(capacity, chunks)
  cover = cover or expert_cover(n * k, local)

  axes = own | varying_axes(x, experts, weights, params)
  x, weights, params = vary((x, weights, params), axes)
  mesh = _Mesh(axis, groups, local, chunks, axes)
  predicate = own | varying_axes(experts)
  first = jax.tree.map(lambda a: a[0], params)
  function, theta = trace_rows(f, x, (first,), cover.sizes, predicate)
  if len(function.out_avals) != 1:
    raise ValueError("`f` must return one array of rows.")
  shared = theta[len(jax.tree.leaves(params)) :]
  theta = [*jax.tree.leaves(params), *shared]

  goes = _home(experts, local)[..., None] == jnp.arange(groups)
  order, count = jax.vmap(compact, 1)(goes.any(1))
  order = jnp.pad(order, ((0, 0), (0, max(capacity.sizes))))  # no slice clamps
  everyone = tuple(sorted(predicate | set(_names(axis))))
  need = lax.pmax(vary(count.max(), frozenset(everyone) & own), everyone)
  trips = capacity.trips(_of_the_batch(need))
  run = _executor(function, mesh, capacity, cover, len(theta) - len(shared))
  y, slots = run(theta, x, weights, experts, order, count, trips)
  if width is not None:
    y = lax.psum(y, width)
  asked = goes.any(-1).sum(dtype=jnp.float32)
  return y, _price(function, slots, asked, n * local * groups, width)


def exchange_cover(
  items: int, choices: int, groups: int, chunks: int = 1
) -> Cover:
  """Rows from one device to another: 1.25 and 2 times the balanced load.

  Where routing is skewed beyond, the larger is exchanged again and again.

  Args:
    items: of one device (static), as are all others.
    choices: per item.
    groups: devices that the experts are spread over.
    chunks: that every size is to be divided into.
  """
  balanced = items * (1 - (1 - 1 / groups) ** choices)
  unit = chunks * max(1, 8 // chunks)
  sizes = {min(items, slack * balanced) / unit for slack in (1.25, 2)}
  return ladder(*sorted({math.ceil(size) * unit for size in sizes}))


class _Mesh(NamedTuple):
  """Where the experts are; all static."""

  axis: Axis
  groups: int
  local: int
  chunks: int
  axes: frozenset[str]  # over which anything differs


class _Parcel(NamedTuple):
  """What this device sends to each, `[G, C]`; `pick` are choices [G, C, K']."""

  item: Int[Array, "G C"]
  live: Bool[Array, "G C"]
  pick: Int[Array, "G C J"]
  expert: Int[Array, "G C J"]  # of those at the destination, or NOBODY

  def take(self, a: Array) -> Array:
    """The rows `[G, C, ...]`; padding repeats one of those that go."""
    return a.at[self.item].get(mode="promise_in_bounds")

  def weight(self, weights: Float[Array, "N K"]) -> Float[Array, "G C J"]:
    """Of the choices that go along."""
    return jnp.take_along_axis(self.take(weights), self.pick, -1)

  def to(self, n: int) -> Int[Array, "G C"]:
    """The item of each row, N for padding."""
    return jnp.where(self.live, self.item, n)


def _home(experts: Array, local: int) -> Array:
  """The device of each choice, -1 of none."""
  return jnp.where(experts >= 0, experts // local, NOBODY)


def _pack(mesh: _Mesh, experts, order, count, begin, size: int) -> _Parcel:
  """The items `begin`, `begin + 1`, ... of those that go to each device."""
  item = lax.dynamic_slice_in_dim(order, begin, size, axis=1)
  live = begin + jnp.arange(size, dtype=jnp.int32) < count[:, None]
  chosen = experts.at[item].get(mode="promise_in_bounds")
  there = jnp.arange(mesh.groups, dtype=jnp.int32)[:, None, None]
  mine = live[..., None] & (_home(chosen, mesh.local) == there)
  most = min(experts.shape[1], mesh.local)  # choices are distinct
  mine, pick = lax.top_k(mine.astype(jnp.int32), most)
  chosen = jnp.take_along_axis(chosen, pick, -1)
  return _Parcel(
    item, live, pick, jnp.where(mine > 0, chosen % mesh.local, NOBODY)
  )


def _exchange(f: RowFunction, mesh: _Mesh, cover: Cover, experts: int):
  """`(rows [G, C, ...], weight, expert, theta) -> (y [G, C, ...], slots)`."""
  send = lambda a: lax.all_to_all(a, mesh.axis, 0, 0, tiled=True)
  fold = lambda a: a.reshape(-1, *a.shape[2:])

  def one(rows, weight, expert, theta):
    params, shared = theta[:experts], theta[experts:]
    apply = lambda r, p: f.apply([r], [*p, *shared])[0]
    plan = dispatch(fold(expert), fold(weight), mesh.local)
    y, cost = expert_apply(apply, fold(rows), plan, params, cover=cover)
    return y.reshape(*rows.shape[:2], *y.shape[1:]), cost.capacity

  def run(rows, weight, expert, theta):
    split = lambda a: jnp.split(a, mesh.chunks, axis=1)
    parts = zip(split(rows), split(weight), split(expert))
    there = [tuple(map(send, part)) for part in parts]
    done = [one(*part, theta) for part in there]
    back = jnp.concatenate([send(y) for y, _ in done], axis=1)
    return back, sum(slots for _, slots in done)

  return run


def _executor(f: RowFunction, mesh: _Mesh, capacity, cover, experts: int):
  """`(theta, x, weights, experts, order, count, trips) -> (y, slots)`."""
  (out,) = f.out_avals
  wide = jnp.promote_types(out.dtype, jnp.float32)
  exchange = _exchange(f, mesh, cover, experts)
  zeros = lambda shape, dtype: vary(jnp.zeros(shape, dtype), mesh.axes)
  total = lambda a: zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32))

  def value(theta, x, weights, experts, order, count, trips):
    def step(begin, size, state):
      y, slots = state
      parcel = _pack(mesh, experts, order, count, begin, size)
      rows, weight = parcel.take(x), parcel.weight(weights)
      back, more = exchange(rows, weight, parcel.expert, theta)
      back = vary(back.astype(wide), mesh.axes)
      return y.at[parcel.to(len(x))].add(back, mode="drop"), slots + more

    none = vary(jnp.zeros((), jnp.float32), varying_axes(count))
    blank = zeros((len(x), *out.shape[1:]), wide), none
    y, slots = _rounds(capacity, trips, step, blank)
    return y.astype(out.dtype), slots

  def backward(residuals, cotangents):
    theta, x, weights, experts, order, count, trips = residuals
    dy = cotangents[0]

    def step(begin, size, state):
      dx, dweights, dtheta = state
      parcel = _pack(mesh, experts, order, count, begin, size)
      back = lambda rows, weight, moving: vary(
        exchange(rows, weight, parcel.expert, merge(moving, theta))[0],
        mesh.axes,
      )
      given = parcel.take(x), parcel.weight(weights), differentiable(theta)
      _, pull = jax.vjp(back, *given)
      live = parcel.live.reshape(*parcel.live.shape, *[1] * (dy.ndim - 1))
      drows, dweight, d = pull(jnp.where(live, parcel.take(dy), 0))
      to = parcel.to(len(x))
      add = lambda a, at, b: a.at[at].add(b.astype(a.dtype), mode="drop")
      dx = add(dx, to, drows)
      dweights = add(dweights, (to[..., None], parcel.pick), dweight)
      return dx, dweights, [a + b.astype(a.dtype) for a, b in zip(dtheta, d)]

    state = total(x), total(weights), [total(a) for a in differentiable(theta)]
    dx, dweights, dtheta = _rounds(capacity, trips, step, state)
    narrow = [d.astype(a.dtype) for d, a in zip(dtheta, differentiable(theta))]
    dx, dweights = dx.astype(x.dtype), dweights.astype(weights.dtype)
    return with_none(narrow, theta), dx, dweights, None, None, None, None

  run = jax.custom_vjp(value)
  run.defvjp(lambda *args: (value(*args), args), backward)
  return run


def _rounds(capacity: Cover, trips, step: Callable, state: Any) -> Any:
  """Runs `step(begin, size, state)` over the capacity; see `run_cover`."""
  done = jnp.zeros((), jnp.int32)
  for size, rounds in zip(capacity.sizes, trips, strict=True):
    body = lambda i, s, size=size, done=done: step(done + i * size, size, s)
    state = lax.cond(
      rounds > 0,
      lambda s, n=rounds, body=body: lax.fori_loop(0, n, body, s),
      lambda s: s,
      state,
    )
    done += rounds * size
  return state


_of_the_batch = with_rule(
  lambda need: need,
  lambda op, batch, batched, need: (need.max(), False),
)
"""The same for all examples under `vmap`, so that conditionals survive it."""


def _price(f: RowFunction, slots, asked, pairs: int, width) -> Cost:
  size, jaxpr = max(f.jaxprs.items())
  row = jaxpr_flops(jaxpr) / size * (lax.axis_size(width) if width else 1)
  zero = jnp.zeros_like(slots)
  return Cost(slots * row, zero + row * pairs, zero + asked, slots, zero)


def _names(axis: Axis) -> tuple[str, ...]:
  return (axis,) if isinstance(axis, str) else tuple(axis)


def _check(x, experts, weights, held: set[int], chunks: int) -> None:
  if experts.ndim != 2 or experts.shape != weights.shape:
    raise ValueError(
      "`experts` and `weights` must both be [items, choices]; got"
      f" {experts.shape} and {weights.shape}."
    )
  if x.ndim < 1 or x.shape[0] < 1 or x.shape[0] != experts.shape[0]:
    raise ValueError(
      f"`x` must hold the {experts.shape[0]} items that chose, and at least"
      f" one; got {x.shape=}."
    )
  if len(held) != 1 or 0 in held:
    raise ValueError(
      "every leaf of `params` needs the same leading axis, the experts of this"
      f" device; got {sorted(held)}."
    )
  if chunks < 1:
    raise ValueError(f"there must be at least 1 chunk; got {chunks=}.")


def _check_spread(x, params, own: frozenset[str]) -> None:
  for name, tree in (("x", x), ("params", params)):
    missing = own - varying_axes(tree)
    if missing:
      raise ValueError(
        f"`{name}` is the same on every device of the mesh axes"
        f" {sorted(missing)}, over which items and experts are spread: shard"
        " its leading axis over them, by the `in_specs` of `shard_map`."
      )


def _check_capacity(capacity: Cover, chunks: int) -> None:
  if any(size % chunks for size in capacity.sizes):
    raise ValueError(
      f"{chunks=} must divide the rows of each exchange, {capacity.sizes}: take"
      " other sizes, or `exchange_cover`."
    )
