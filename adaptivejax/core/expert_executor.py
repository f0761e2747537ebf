# SPDX-License-Identifier: Apache-2.0
"""How `expert_apply` runs: its chunks, and its gradient.

Forward, a chunk gathers the rows of its slots, runs them with its expert's
parameters, and adds them, weighted, to the items' sum.  Under differentiation
it also keeps, slot by slot, what it made and the matrix products inside, which
is all that is dear to compute again; the backward pass is one more such run.
Where each item may run all experts and few do, most slots are nobody's: of such
a plan the first S slots are kept (`kept`), and the others computed again.

Axes: N items, M slots, S of them kept, E experts, C slots of one chunk.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from adaptivejax.core.batching import looped
from adaptivejax.core.chunks import where
from adaptivejax.core.combine import by_row
from adaptivejax.core.covers import Cover
from adaptivejax.core.dispatch import Dispatch
from adaptivejax.core.groups import GroupChunk, run_groups
from adaptivejax.core.rowwise import (
  RowFunction,
  differentiable,
  merge,
  with_none,
)
from adaptivejax.core.varying import vary, varying_axes

KEPT = 4
"""Choices of an item whose products are kept where it may make any number."""


def kept(plan: Dispatch, items: int) -> int:
  """S: all M slots, but few where each item may run all E experts (static)."""
  slots = plan.item.shape[0]
  if slots < items * plan.sizes.shape[0]:
    return slots
  return min(slots, KEPT * items)


def executor(f: RowFunction, cover: Cover, shared: int) -> Callable:
  """`(theta, x, plan) -> (y, slots)` and its gradient, which `vmap` loops."""
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

  def transpose(rows, theta, axes):
    """`(y, leaves, tree, given)` of its transpose; which leaves are inputs."""

    def apply(rows, moving):
      return vary(row_form(rows, merge(moving, theta)), axes)

    y, pull = jax.vjp(apply, rows, differentiable(theta))
    leaves, tree = jax.tree.flatten(pull)
    inputs = {id(a) for a in (rows, *theta)}
    return y, leaves, tree, [id(a) in inputs for a in leaves]

  def by_slot(x, theta, axes):
    """The places of leaves that grow with the rows: products to keep.

    By their shapes at two sizes: a weight may be as long as a chunk.
    """
    sizes, shapes = sorted(f.jaxprs)[:2], []
    of_one = [a[0] for a in theta[: len(theta) - shared]]
    theta = of_one + theta[len(of_one) :]

    def note(size):
      rows = jnp.broadcast_to(x[:1], (size, *x.shape[1:]))
      _, leaves, _, given = transpose(rows, theta, axes)
      shapes.append([() if g else a.shape for a, g in zip(leaves, given)])

    for size in sizes:
      jax.eval_shape(functools.partial(note, size))
    grow = lambda a, b: (*a[:1], *b[:1]) == tuple(sizes) and a[1:] == b[1:]
    pairs = zip(*shapes, strict=True)
    return [i for i, (a, b) in enumerate(pairs) if grow(a, b)]

  def rows_of(chunk, x, item):
    return x.at[chunk.take(item)].get(mode="promise_in_bounds")

  def add_rows(chunk, y, item, rows):
    to = jnp.where(chunk.live, chunk.take(item), y.shape[0])
    return y.at[to].add(rows.astype(y.dtype), mode="drop")

  def products(chunk, theta, x, item, axes):
    """What the chunk makes, and what is dear in making it."""
    rows, given = rows_of(chunk, x, item), of_chunk(chunk, theta)
    new, leaves, *_ = transpose(rows, given, axes)
    places = by_slot(x, theta, axes)
    return [vary(a, axes) for a in (new, *(leaves[i] for i in places))]

  def value(theta, x, plan):
    axes = f.out_axes | varying_axes(x, plan)

    def step(chunk, y):
      (new,) = f.apply([rows_of(chunk, x, plan.item)], of_chunk(chunk, theta))
      new = vary(new.astype(wide), axes)
      new = new * by_row(chunk.take(plan.weight), new)
      return add_rows(chunk, y, plan.item, new)

    start = zeros((x.shape[0], *out.shape[1:]), wide, axes)
    y, slots = run_groups(
      cover, plan.sizes, step, start, rows=plan.item.shape[0]
    )
    return y.astype(out.dtype), slots

  def forward(theta, x, plan):
    """`value`, and what the backward pass would else compute again."""
    axes = f.out_axes | varying_axes(x, plan, theta)
    make = lambda chunk: products(chunk, theta, x, plan.item, axes)

    def step(chunk, state):
      y, store = state
      made = make(chunk)
      new = made[0].astype(wide)
      new = new * by_row(chunk.take(plan.weight), new)
      y = add_rows(chunk, y, plan.item, new)
      return y, [chunk.put(a, b) for a, b in zip(store, made, strict=True)]

    live = jnp.ones(min(cover.sizes), bool)
    some = GroupChunk(jnp.int32(0), jnp.int32(0), live)
    shapes = jax.eval_shape(lambda: make(some))
    keep = kept(plan, x.shape[0])
    store = [zeros((keep, *a.shape[1:]), a.dtype, axes) for a in shapes]
    start = zeros((x.shape[0], *out.shape[1:]), wide, axes), store
    (y, store), slots = run_groups(
      cover, plan.sizes, step, start, rows=plan.item.shape[0]
    )
    return y.astype(out.dtype), slots, store

  def backward(theta, x, plan, store, dy):
    axes = varying_axes(x, plan, dy, theta)
    own = len(theta) - shared
    moving = [jnp.issubdtype(a.dtype, jnp.inexact) for a in theta]
    of_group = [i < own for i, m in enumerate(moving) if m]
    places = by_slot(x, theta, axes)
    wider = lambda a: jnp.promote_types(a.dtype, jnp.float32)
    item, keep = plan.item, kept(plan, x.shape[0])

    def made(chunk):
      """What `forward` made of the chunk."""
      take = lambda chunk: [vary(chunk.take(a), axes) for a in store]
      if keep == item.shape[0]:
        return take(chunk)
      again = lambda chunk: products(chunk, theta, x, item, axes)
      stored = chunk.begin + chunk.live.sum() <= keep
      return lax.cond(stored, take, again, chunk)

    def step(chunk, state):
      dx, dweight, dtheta = state
      rows, given = rows_of(chunk, x, item), of_chunk(chunk, theta)
      _, leaves, tree, _ = transpose(rows, given, axes)
      y, *products = made(chunk)
      for i, a in zip(places, products, strict=True):
        leaves[i] = a  # what it was made of is dead code now
      cot = rows_of(chunk, dy, item).astype(wide)
      cot = where(chunk.live, cot, jnp.zeros_like(cot))
      scaled = cot * by_row(chunk.take(plan.weight), cot)
      drows, dtheta_one = jax.tree.unflatten(tree, leaves)(
        scaled.astype(y.dtype)
      )
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
      zeros(plan.weight.shape, wide, axes),
      [zeros(a.shape, wider(a), axes) for a in differentiable(theta)],
    )
    (dx, dweight, dtheta), _ = run_groups(
      cover, plan.sizes, step, start, rows=plan.item.shape[0]
    )
    narrow = [d.astype(a.dtype) for d, a in zip(dtheta, differentiable(theta))]
    return narrow, dx.astype(x.dtype), dweight.astype(plan.weight.dtype)

  forward, backward = looped(forward), looped(backward)
  run = jax.custom_vjp(value)

  def run_forward(*args):
    y, slots, store = forward(*args)
    return (y, slots), (*args, store)

  def run_backward(residuals, cotangents):
    theta, _, plan, _ = residuals
    dtheta, dx, dweight = backward(*residuals, cotangents[0])
    return with_none(dtheta, theta), dx, plan.cotangent(dweight)

  run.defvjp(run_forward, run_backward)
  return run
