# SPDX-License-Identifier: Apache-2.0
r"""`expert_apply_parallel`: experts spread over devices, items sent to them.

Inside `jax.shard_map` each device has N items of its own and L of the experts:

    pack the items by device -> all_to_all -> `expert_apply` -> all_to_all -> +

An item travels once to each device that holds an expert of its, with these
choices and their weights, and comes back as one weighted sum.

* Exact and dropless under any skew.  An all_to_all has a static size, C rows
  from each device to each; a cover (`core.covers`) of the fullest destination
  says which sizes are exchanged, and how often.  The default is a little above
  the balanced load, and repeats, so memory is bounded, too.
* No deadlock: the fullest destination is `pmax`-ed over all devices, so each
  runs the same exchanges, backward as forward; operands are made device-varying
  before (`core.varying`), so no other collective gets in.
* Only real rows are computed: padding travels, marked as nobody's.
* Under `vmap` a batch shares the exchanges of its fullest example.

`lax.ragged_all_to_all` would spare the padding, but CPUs do not have it.

Axes: N items of this device, K choices per item, E experts, G devices, L = E/G
experts of this device, C rows from one device to another.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.batching import with_rule
from adaptivejax.core.cost import Cost, jaxpr_flops
from adaptivejax.core.covers import Cover, ladder
from adaptivejax.core.expert_exchange import (
  Axis,
  Layout,
  Queue,
  executor,
  home,
)
from adaptivejax.core.experts import expert_cover
from adaptivejax.core.rowwise import RowFunction, trace_rows
from adaptivejax.core.varying import vary, varying_axes


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
  together: Callable[..., Array] | None = None,
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
    chunks: independent parts that each exchange is cut into, so that one may
      travel while another is computed (static).  On TPU it does with
      `xla_tpu_enable_async_all_to_all`, by the compiler's schedule for v5e.
    together: `f` of all rows of a device at once, as in `expert_apply`, which
      is what runs on a TPU.
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
  local, (n, k) = _check(x, experts, weights, params), experts.shape
  own = varying_axes(lax.axis_index(axis))  # none where types do not tell
  _check_spread(x, params, own)
  if capacity is None:
    capacity = exchange_cover(n, k, groups, chunks)
  _check_capacity(capacity, chunks)
  cover = cover or expert_cover(groups * max(capacity.sizes) // chunks)

  decide = own | varying_axes(experts)
  axes = decide | varying_axes(x, weights, params)
  experts = vary(experts, decide)
  x, weights, params = vary((x, weights, params), axes)
  first = jax.tree.map(lambda a: a[0], params)
  function, theta = trace_rows(f, x, (first,), cover.sizes, decide)
  if len(function.out_avals) != 1:
    raise ValueError("`f` must return one array of rows.")
  leaves = jax.tree.leaves(params)
  theta = [*leaves, *theta[len(leaves) :]]

  at = Layout(axis, groups, local, chunks, axes, n * k)
  queue = Queue.of(experts, at, max(capacity.sizes))
  everyone = jax.sharding.get_abstract_mesh().manual_axes
  need = vary(queue.count.max(), frozenset(everyone) if own else own)
  need = lax.pmax(need, everyone)
  trips = capacity.trips(_of_the_batch(need))
  of_leaves = None
  if together is not None and len(theta) == len(leaves):  # nothing is shared
    tree = jax.tree.structure(params)
    of_leaves = lambda rows, leaves, product: together(
      rows, jax.tree.unflatten(tree, leaves), product
    )
  run = executor(function, at, capacity, cover, len(leaves), of_leaves)
  y, slots = run(theta, x, weights, experts, queue, trips)
  if width is not None:
    y = lax.psum(y, width)
  device = home(experts, local)
  asked = ((device >= 0) & (device < groups)).sum(dtype=jnp.float32)
  # every exchange, in the worst case, full of rows that all local experts run
  sizes = [groups * size // chunks for size in capacity.sizes]
  each = [chunks * local * cover.most(size) for size in sizes]
  rounds = capacity.trips(np.arange(n + 1))
  most = int(np.tensordot(each, rounds, 1).max())
  return y, _price(function, slots, asked, n * local * groups, most, width)


def exchange_cover(
  items: int, choices: int, groups: int, chunks: int = 1
) -> Cover:
  """Rows from one device to another: 1.25 times the balanced load.

  Where routing is skewed beyond, as many are exchanged again and again.  Each
  size more is a program more to compile, on a TPU some dozen kernels.

  Args:
    items: of one device (static), as are all others.
    choices: per item.
    groups: devices that the experts are spread over.
    chunks: that divide every size.
  """
  if min(items, choices, groups, chunks) < 1:
    raise ValueError(
      f"there must be at least one of each: {items=}, {choices=}, {groups=},"
      f" {chunks=}."
    )
  balanced = items * (1 - (1 - 1 / groups) ** choices)
  unit = chunks * max(1, 8 // chunks)
  return ladder(math.ceil(min(items, 1.25 * balanced) / unit) * unit)


_of_the_batch = with_rule(
  lambda need: need, lambda op, batch, batched, need: (need.max(), False)
)
"""The same for all examples under `vmap`, so that conditionals survive it."""


def _price(f: RowFunction, slots, asked, pairs: int, most: int, width) -> Cost:
  size, jaxpr = max(f.jaxprs.items())
  row = jaxpr_flops(jaxpr) / size * (lax.axis_size(width) if width else 1)
  zero = jnp.zeros_like(slots)
  bound = jnp.float32(most) * jnp.float32(row)  # rounded as `spent` is
  full, asked = zero + row * pairs, zero + asked
  return Cost(slots * row, full, asked, slots, zero, bound)


def _check(x, experts, weights, params) -> int:
  """L, the experts of this device."""
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
  held = {a.shape[0] if a.ndim else 0 for a in jax.tree.leaves(params)}
  if len(held) != 1 or 0 in held:
    raise ValueError(
      "every leaf of `params` needs the same leading axis, the experts of this"
      f" device; got {sorted(held)}."
    )
  return held.pop()


def _check_spread(x, params, own: frozenset[str]) -> None:
  for name, leaves in (("x", [x]), ("params", jax.tree.leaves(params))):
    missing = own - frozenset.intersection(*map(varying_axes, leaves))
    if missing:
      raise ValueError(
        f"`{name}` is the same on every device of the mesh axes"
        f" {sorted(missing)}, over which items and experts are spread: shard"
        " its leading axis over them, by the `in_specs` of `shard_map`."
      )


def _check_capacity(capacity: Cover, chunks: int) -> None:
  if chunks < 1 or any(size % chunks for size in capacity.sizes):
    raise ValueError(
      f"{chunks=} must divide the rows of each exchange, {capacity.sizes}: take"
      " other sizes, or `exchange_cover`."
    )
