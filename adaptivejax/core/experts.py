# SPDX-License-Identifier: Apache-2.0
r"""`expert_apply`: every item runs through the experts it was dispatched to.

    y_n = sum over slots m of item n of  weight_m f(x_n, params_{e(m)})

Each expert's slots are covered by chunks of static size (`core.covers`), and
all chunks of one size run in one loop, whichever expert they are of: few bodies
compile, whatever E is, and an expert that nobody chose costs nothing.  A chunk
gathers its rows, runs `f` on them with its expert's parameters, and adds its
weighted rows to y; forward, nothing of the size of all slots is ever stored.

It keeps the laws as `bucketed` does: padding repeats a row of the same expert;
`vmap` folds the batch into the items, and so does `grad(vmap)` (gradients for
each example, `vmap(grad)`, run example by example); in `shard_map` every device
runs its own chunks.  Unlike there, the backward pass keeps the matrix products,
one row for each of the M slots, used or not; where an item may run all experts,
it keeps those of 4 N slots, and computes the rest again.  On a TPU layers made
of matrix products run by a kernel (`core.expert_kernel`).

Axes: N items, M slots, E experts, C rows of one chunk, R chunk sizes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.chunks import Leaves, where
from adaptivejax.core.combine import by_row
from adaptivejax.core.cost import Cost, jaxpr_flops
from adaptivejax.core.covers import MIN_CHUNK, Cover, cheapest
from adaptivejax.core.dispatch import Dispatch
from adaptivejax.core.expert_executor import executor
from adaptivejax.core.expert_folding import fold_items
from adaptivejax.core.expert_kernel import kernels
from adaptivejax.core.rowwise import RowFunction, trace_rows
from adaptivejax.core.varying import vary, varying_axes


def expert_apply(
  f: Callable[[Array, Any], Array],
  x: Float[Array, "N ..."],
  plan: Dispatch,
  params: Any,
  *,
  together: Callable[..., Array] | None = None,
  cover: Cover | None = None,
) -> tuple[Float[Array, "N ..."], Cost]:
  """Sums what its experts make of each item, at the cost of the slots.

  Args:
    f: row-wise, `f(rows, params of one expert) -> rows`; traced once per chunk
      size.  It may close over traced arrays that experts share.
    x: the items.
    plan: who runs what (`dispatch`); dropless.
    params: pytree whose leaves all have the leading axis E.
    together: `f` of all slots at once, `together(rows, params, product)` with
      `product(rows, w)` for each `rows @ w`; on a TPU, and in 16 bits on Hopper
      GPUs, this is what runs, by the grouped-matmul kernel, whose padding
      `cost` leaves out; elsewhere, where arrays differ over different axes of a
      mesh, and where the kernel has no tiles, `f` runs in chunks.  It closes
      over nothing that is traced.
    cover: chunk sizes for the slots of one expert (static); `expert_cover` if
      not given.

  Returns:
    `(y, cost)`; an item without an expert gets zero.  `cost.full` is that of
    all experts on all items.  Differentiable in x, the weights and `params`.

  Raises:
    ValueError: shapes do not fit one another, or as for `bucketed`, whose
      notes on `jit`, forward mode and sharding hold here too.
  """
  call = _trace(f, x, plan, params, cover)
  run = _executor(call.f, call.shared, together, jax.tree.structure(params))
  y, slots = fold_items(run, cover)(call.theta, call.x, plan)
  most = most_slots(cover or _default(call.f, len(x)), plan, len(x))
  return y, _price(call, plan, slots, most)


def most_slots(cover: Cover, plan: Dispatch, items: int) -> int:
  """Slots executed at most, whatever the routes (static).

  That is the most of sum_e slots(n_e) over all n_e <= N that sum to the number
  of choices M at most.  For any price p of a choice (Lagrange)

      sum_e slots(n_e) <= p M + E max_n (slots(n) - p n),

  of which the least is taken; p = 0 lets all experts have all items.
  """
  experts, choices = plan.sizes.shape[0], plan.item.shape[0]
  counts = np.arange(items + 1)
  slots = np.tensordot(cover.sizes, cover.trips(counts), 1)
  prices = np.linspace(0, 2, 41)
  beyond = [(slots - price * counts).max() for price in prices]
  most = (prices * choices + experts * np.asarray(beyond)).min()
  return math.floor(most + 1e-3)  # slots are whole, prices are rounded


def _executor(f: RowFunction, shared: int, together, tree) -> Callable:
  """`(cover, theta, x, plan) -> (y, slots)`, for any number of items."""

  def run(cover, theta, x, plan):
    cover = cover or _default(f, x.shape[0])
    chunks = executor(f, cover, shared)
    found = {}
    if together is not None:
      found = kernels(together, f, tree, chunks, theta, x, plan)
    if not found:
      return chunks(theta, x, plan)
    return lax.platform_dependent(theta, x, plan, **found, default=chunks)

  return run


def expert_apply_dense(
  f: Callable[[Array, Any], Array],
  x: Float[Array, "N ..."],
  plan: Dispatch,
  params: Any,
  *,
  together: Callable[..., Array] | None = None,
  cover: Cover | None = None,
) -> tuple[Float[Array, "N ..."], Cost]:
  """The dense twin: all experts on all items, weighted by a matrix [N, E]."""
  del together
  call = _trace(f, x, plan, params, cover)
  n, count = x.shape[0], plan.sizes.shape[0]
  to = jnp.where(plan.valid, plan.item, n)
  gate = jnp.zeros((n, count), plan.weight.dtype)
  gate = gate.at[to, plan.expert].add(plan.weight, mode="drop")
  asked = jnp.zeros((n, count), bool).at[to, plan.expert].set(True, mode="drop")

  def one(expert):
    params, weight, mask = expert
    # what nobody asked for must not reach a gradient
    any_row = jnp.where(mask.any(), x[mask.argmax()], jnp.ones_like(x[0]))
    rows = where(mask, x, lax.stop_gradient(any_row)[None])
    params = jax.tree.map(
      lambda a: jnp.where(mask.any(), a, jnp.zeros_like(a)), params
    )
    out = f(rows, params).astype(jnp.float32)
    return where(mask, out * by_row(weight, out), jnp.zeros_like(out))

  parts = lax.map(one, (params, gate.T, asked.T))
  slots = jnp.full_like(plan.sizes, n * count, jnp.float32, shape=())
  y = parts.sum(0).astype(call.f.out_avals[0].dtype)
  return y, _price(call, plan, slots, n * count)


def grouped_matmul(
  x: Float[Array, "M D"], w: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "M F"]:
  """Row m times the matrix of its group, for rows sorted by group.

  Args:
    x: the rows; the first `sizes[0]` belong to group 0, and so on.
    w: one matrix per group.
    sizes: rows per group, which may be 0 (dynamic); rows past their sum give 0.
  """
  rows = jnp.arange(x.shape[0], dtype=jnp.int32)
  plan = Dispatch(rows, jnp.ones(x.shape[0], x.dtype), sizes)
  return expert_apply(lambda r, w: r @ w, x, plan, w)[0]


CHUNKS = (512, 256, 128, 40, 8)
"""Chunk sizes: five bodies that serve groups of 8 to many rows alike."""

PRICE = 35
"""Rows that reading an expert's weights costs, on CPU (see benchmarks)."""


@functools.cache
def _folded_cover(items: int) -> Cover:
  """That of a batch of calls, of sizes that every call traces."""
  sizes = [size for size in CHUNKS if size <= max(items, CHUNKS[-1])]
  return cheapest(*sizes, price=PRICE)


def _default(f: RowFunction, items: int) -> Cover:
  cover = expert_cover(items)
  return cover if set(cover.sizes) <= set(f.jaxprs) else _folded_cover(items)


@functools.cache
def expert_cover(items: int) -> Cover:
  """The chunk sizes that `expert_apply` uses for up to `items` per expert."""
  most = min(CHUNKS[0], -(-items // MIN_CHUNK) * MIN_CHUNK)
  return cheapest(most, *(size for size in CHUNKS if size < most), price=PRICE)


class _Call(NamedTuple):
  """One call: parameters as leaves, of the experts and of all alike."""

  f: RowFunction
  theta: Leaves
  shared: int
  x: Array


def _trace(f, x, plan: Dispatch, params, cover) -> _Call:
  count = plan.sizes.shape[0]
  leaves = jax.tree.leaves(params)
  _check(x, plan, leaves, count)
  if cover:
    sizes = set(cover.sizes) | {2 * cover.sizes[0]}  # tell rows from the rest
  else:
    sizes = {*CHUNKS, *expert_cover(x.shape[0]).sizes}  # see `_default`
  predicate = varying_axes(plan.item, plan.sizes)
  axes = predicate | varying_axes(x, plan.weight)
  x, params = vary(x, axes), vary(params, axes | varying_axes(params))
  first = jax.tree.map(lambda a: a[0], params)
  function, theta = trace_rows(f, x, (first,), tuple(sizes), predicate)
  if len(function.out_avals) != 1:
    raise ValueError("`f` must return one array of rows.")
  shared = theta[len(leaves) :]
  return _Call(function, [*jax.tree.leaves(params), *shared], len(shared), x)


def _check(x, plan: Dispatch, leaves: Leaves, count: int) -> None:
  sizes = {a.shape[0] if a.ndim else 0 for a in leaves}
  if sizes != {count}:
    raise ValueError(
      f"every leaf of `params` needs the leading axis of the plan's {count}"
      f" experts; got {sorted(sizes)}."
    )
  if x.ndim < 1 or x.shape[0] < 1:
    raise ValueError(f"`x` must hold at least one item; got {x.shape=}.")
  if plan.item.shape != plan.weight.shape or plan.item.ndim != 1:
    raise ValueError(
      "a plan has one item and one weight per slot; got"
      f" {plan.item.shape} and {plan.weight.shape}: make it with `dispatch`."
    )
  if plan.place is not None and plan.place.shape[0] != x.shape[0]:
    raise ValueError(
      f"the plan is for {plan.place.shape[0]} items, and `x` holds"
      f" {x.shape[0]}: dispatch the choices of these."
    )


def _price(call: _Call, plan: Dispatch, slots: Array, most: int) -> Cost:
  size, jaxpr = max(call.f.jaxprs.items())
  row = jaxpr_flops(jaxpr) / size
  full = row * call.x.shape[0] * plan.sizes.shape[0]
  items = plan.sizes.sum().astype(jnp.float32)
  zero = jnp.zeros_like(slots)
  bound = jnp.float32(most) * jnp.float32(row)  # rounded as `spent` is
  return Cost(slots * row, zero + full, items, slots, zero, bound)
