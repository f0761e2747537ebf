# SPDX-License-Identifier: Apache-2.0
r"""`expert_apply`: every item runs through the experts it was dispatched to.

    y_n = sum over slots m of item n of  weight_m f(x_n, params_{e(m)})

Each expert's slots are covered by chunks of static size (`core.covers`), and
all chunks of one size run in one loop, whichever expert they are of: few bodies
compile, whatever E is, and an expert that nobody chose costs nothing.  A chunk
gathers its rows, runs `f` on them with its expert's parameters, and adds its
weighted rows to y, so that nothing of the size of all slots is ever stored.

It keeps the laws as `bucketed` does: padding repeats a row of the same expert;
the backward pass saves the inputs only; `vmap` folds the batch into the items;
in `shard_map` every device runs its own chunks.  On a TPU, `together` may say
how to compute all slots at once, by a kernel.

Axes: N items, M slots, E experts, C rows of one chunk, R chunk sizes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.batching import loop, looped, with_rule
from adaptivejax.core.chunks import Leaves, where
from adaptivejax.core.cost import Cost, jaxpr_flops
from adaptivejax.core.covers import Cover, cheapest
from adaptivejax.core.dispatch import Dispatch
from adaptivejax.core.groups import GroupChunk, run_groups
from adaptivejax.core.rowwise import (
  RowFunction,
  differentiable,
  merge,
  trace_rows,
  with_none,
)
from adaptivejax.core.varying import vary, varying_axes


def expert_apply(
  f: Callable[[Array, Any], Array],
  x: Float[Array, "N ..."],
  plan: Dispatch,
  params: Any,
  *,
  cover: Cover | None = None,
) -> tuple[Float[Array, "N ..."], Cost]:
  """Sums what its experts make of each item, at the cost of the slots.

  Args:
    f: row-wise, `f(rows, params of one expert) -> rows`; traced once per chunk
      size.  It may close over traced arrays that experts share.
    x: the items.
    plan: who runs what (`dispatch`); dropless.
    params: pytree whose leaves all have the leading axis E.
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
  run = _executor(call.f, call.cover, call.shared)
  y, slots = run(call.theta, call.x, plan.weight, plan.item, plan.sizes)
  return y, _price(call, plan, slots)


def expert_apply_dense(
  f: Callable[[Array, Any], Array],
  x: Float[Array, "N ..."],
  plan: Dispatch,
  params: Any,
  *,
  cover: Cover | None = None,
) -> tuple[Float[Array, "N ..."], Cost]:
  """The dense twin: all experts on all items, weighted by a matrix [N, E]."""
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
    return where(mask, out * _wide(weight, out), jnp.zeros_like(out))

  parts = lax.map(one, (params, gate.T, asked.T))
  slots = jnp.full_like(plan.sizes, n * count, jnp.float32, shape=())
  return parts.sum(0).astype(call.f.out_avals[0].dtype), _price(
    call, plan, slots
  )


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


CHUNKS = (512, 128, 40, 24, 8)
"""Chunk sizes: five bodies that serve groups of 8 to many rows alike."""

PRICE = 25
"""Rows that reading an expert's weights costs, on CPU (see benchmarks)."""


def expert_cover(items: int) -> Cover:
  """The chunk sizes that `expert_apply` uses for up to `items` per expert."""
  fit = [size for size in CHUNKS if size < items]
  above = [size for size in CHUNKS if size >= items]
  return cheapest(*above[-1:], *fit, price=PRICE)


class _Call(NamedTuple):
  """One call: parameters as leaves, of the experts and of all alike."""

  f: RowFunction
  theta: Leaves
  shared: int
  x: Array
  cover: Cover


def _trace(f, x, plan: Dispatch, params, cover) -> _Call:
  count = plan.sizes.shape[0]
  leaves = jax.tree.leaves(params)
  _check(x, plan, leaves, count)
  cover = cover or expert_cover(x.shape[0])
  predicate = varying_axes(plan.item, plan.sizes)
  axes = predicate | varying_axes(x, plan.weight)
  x, params = vary(x, axes), vary(params, axes | varying_axes(params))
  first = jax.tree.map(lambda a: a[0], params)
  function, theta = trace_rows(f, x, (first,), cover.sizes, predicate)
  if len(function.out_avals) != 1:
    raise ValueError("`f` must return one array of rows.")
  shared = theta[len(leaves) :]
  return _Call(
    function, [*jax.tree.leaves(params), *shared], len(shared), x, cover
  )


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


def _price(call: _Call, plan: Dispatch, slots: Array) -> Cost:
  size, jaxpr = max(call.f.jaxprs.items())
  row = jaxpr_flops(jaxpr) / size
  full = row * call.x.shape[0] * plan.sizes.shape[0]
  items = plan.sizes.sum().astype(jnp.float32)
  zero = jnp.zeros_like(slots)
  return Cost(slots * row, zero + full, items, slots, zero)


def _by_row(weight: Array, rows: Array) -> Array:
  return weight.reshape(-1, *[1] * (rows.ndim - 1)).astype(rows.dtype)


def _executor(f: RowFunction, cover: Cover, shared: int) -> Callable:
  """`(theta, x, weight, item, sizes) -> (y, slots)`, gradient and batching."""
  (out,) = f.out_avals
  wide = jnp.promote_types(out.dtype, jnp.float32)  # a sum over experts
  row_form = jax.checkpoint(
    lambda rows, theta: f.apply([rows], theta)[0],
    policy=jax.checkpoint_policies.dots_saveable,
  )

  def zeros(shape, dtype, axes):
    return vary(jnp.zeros(shape, dtype), axes)

  def of_chunk(chunk, theta):
    """The parameters of the chunk's expert, and what all share."""
    own = len(theta) - shared
    return [chunk.of_group(a) for a in theta[:own]] + theta[own:]

  def linearize(rows, theta, axes):
    """`(y, pull, kept, join)`: the matrix products that `pull` depends on.

    `join(kept)` is `pull` on products that were stored before: then what `pull`
    was made of is dead code, and nothing is computed twice.
    """

    def apply(rows, moving):
      return vary(row_form(rows, merge(moving, theta)), axes)

    moving = differentiable(theta)
    y, pull = jax.vjp(apply, rows, moving)
    leaves, tree = jax.tree.flatten(pull)
    given = {id(a) for a in (rows, *theta)}
    places = [
      i
      for i, a in enumerate(leaves)
      if id(a) not in given and a.shape[:1] == rows.shape[:1]
    ]

    def join(kept):
      filled = list(leaves)
      for i, a in zip(places, kept, strict=True):
        filled[i] = a
      return jax.tree.unflatten(tree, filled)

    return y, [leaves[i] for i in places], join

  def rows_of(chunk, x, item):
    return x.at[chunk.take(item)].get(mode="promise_in_bounds")

  def add_rows(chunk, y, item, rows):
    to = jnp.where(chunk.live, chunk.take(item), y.shape[0])
    return y.at[to].add(rows.astype(y.dtype), mode="drop")

  def value(theta, x, weight, item, sizes):
    axes = f.out_axes | varying_axes(x, weight, item, sizes)

    def step(chunk, y):
      (new,) = f.apply([rows_of(chunk, x, item)], of_chunk(chunk, theta))
      new = vary(new.astype(wide), axes)
      return add_rows(chunk, y, item, new * _by_row(chunk.take(weight), new))

    start = zeros((x.shape[0], *out.shape[1:]), wide, axes)
    y, slots = run_groups(cover, sizes, step, start)
    return y.astype(out.dtype), slots

  def forward(theta, x, weight, item, sizes):
    """`value`, and what the backward pass would else compute again."""
    axes = f.out_axes | varying_axes(x, weight, item, sizes, theta)

    def products(chunk):
      rows, given = rows_of(chunk, x, item), of_chunk(chunk, theta)
      new, kept, _ = linearize(rows, given, axes)
      return [new, *kept]

    def step(chunk, state):
      y, store = state
      made = products(chunk)
      new = made[0].astype(wide)
      y = add_rows(chunk, y, item, new * _by_row(chunk.take(weight), new))
      return y, [chunk.put(a, vary(b, axes)) for a, b in zip(store, made)]

    size = min(cover.sizes)
    some = GroupChunk(jnp.int32(0), jnp.int32(0), jnp.ones(size, bool))
    shapes = jax.eval_shape(lambda: products(some))
    m = item.shape[0]
    store = [zeros((m, *a.shape[1:]), a.dtype, axes) for a in shapes]
    start = zeros((x.shape[0], *out.shape[1:]), wide, axes), store
    (y, store), slots = run_groups(cover, sizes, step, start)
    return y.astype(out.dtype), slots, store

  def backward(theta, x, weight, item, sizes, store, dy):
    axes = varying_axes(x, weight, item, sizes, dy, theta)
    own = len(theta) - shared
    moving = [jnp.issubdtype(a.dtype, jnp.inexact) for a in theta]
    of_group = [i < own for i, m in enumerate(moving) if m]
    wider = lambda a: jnp.promote_types(a.dtype, jnp.float32)

    def step(chunk, state):
      dx, dweight, dtheta = state
      rows, given = rows_of(chunk, x, item), of_chunk(chunk, theta)
      *_, join = linearize(rows, given, axes)
      y, *kept = (chunk.take(a) for a in store)
      cot = rows_of(chunk, dy, item).astype(wide)
      cot = where(chunk.live, cot, jnp.zeros_like(cot))
      scaled = cot * _by_row(chunk.take(weight), cot)
      drows, dtheta_one = join(kept)(scaled.astype(y.dtype))
      gain = (cot * y.astype(wide)).reshape(cot.shape[0], -1).sum(1)
      add = lambda a, b, own: a.at[chunk.group].add(b) if own else a + b
      return (
        add_rows(chunk, dx, item, drows),
        chunk.put(dweight, gain),
        [
          add(a, b.astype(a.dtype), o)
          for a, b, o in zip(dtheta, dtheta_one, of_group, strict=True)
        ],
      )

    start = (
      zeros(x.shape, wider(x), axes),
      zeros(weight.shape, wide, axes),
      [zeros(a.shape, wider(a), axes) for a in differentiable(theta)],
    )
    (dx, dweight, dtheta), _ = run_groups(cover, sizes, step, start)
    narrow = [d.astype(a.dtype) for d, a in zip(dtheta, differentiable(theta))]
    return narrow, dx.astype(x.dtype), dweight.astype(weight.dtype)

  value = _folded(value)
  forward, backward = looped(forward), looped(backward)
  run = jax.custom_vjp(value)

  def run_forward(*args):
    y, slots, store = forward(*args)
    return (y, slots), (*args, store)

  def run_backward(residuals, cotangents):
    dtheta, dx, dweight = backward(*residuals, cotangents[0])
    return with_none(dtheta, residuals[0]), dx, dweight, None, None

  run.defvjp(run_forward, run_backward)
  return run


def _folded(value: Callable) -> Callable:
  """Under `vmap`, a batch of items; where parameters are batched, it loops."""

  def rule(op, batch, batched, theta, x, weight, item, sizes):
    if any(batched[0]):
      return loop(op, batch, batched, theta, x, weight, item, sizes)
    spread = lambda a, b: a if b else jnp.broadcast_to(a, (batch, *a.shape))
    x, weight, item, sizes = map(
      spread, (x, weight, item, sizes), tuple(batched[1:])
    )
    n, count = x.shape[1], sizes.shape[1]
    whole = jax.vmap(lambda *a: Dispatch(*a))(item, weight, sizes)
    valid = jax.vmap(lambda p: p.valid)(whole)
    expert = jax.vmap(lambda p: p.expert)(whole)
    order = jnp.argsort(jnp.where(valid, expert, count).reshape(-1))
    offset = jnp.arange(batch, dtype=jnp.int32)[:, None] * n
    sort = lambda a: a.reshape(-1)[order]
    y, slots = op(
      theta,
      x.reshape(batch * n, *x.shape[2:]),
      sort(weight),
      sort(item + offset),
      sizes.sum(0),
    )
    y = y.reshape(batch, n, *y.shape[1:])
    return (y, jnp.broadcast_to(slots / batch, (batch,))), (True, True)

  return with_rule(value, rule)
