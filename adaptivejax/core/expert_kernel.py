# SPDX-License-Identifier: Apache-2.0
"""All experts at once by a grouped-matmul kernel: on TPUs and Hopper GPUs.

The slots are gathered, sorted by expert as they are, every matrix product of
the layer is one grouped product over all slots, and the rows are added up by
item (`core.combine`).  What is nobody's reaches nothing, as in
`core.expert_executor`.

Axes: N items, M slots, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from adaptivejax.core.batching import looped
from adaptivejax.core.combine import combine, spread
from adaptivejax.core.dispatch import Dispatch
from adaptivejax.core.expert_executor import kept
from adaptivejax.core.marks import marked
from adaptivejax.core.rowwise import (
  RowFunction,
  differentiable,
  merge,
  with_none,
)
from adaptivejax.core.varying import varying_axes
from pallas_kernels.grouped_matmul import gpu, grouped_matmul
from pallas_kernels.mosaic_gpu import on_hopper

DTYPES = (jnp.bfloat16, jnp.float32)


def fits(x: Array, params: Any, plan: Dispatch) -> bool:
  """Whether the kernel takes these arrays: all of one dtype.

  In `shard_map` all must also differ over the same mesh axes, so that a
  gradient is of the type of what it is for.
  """
  leaves = [x, *jax.tree.leaves(params)]
  alike = len({a.dtype for a in leaves}) == 1 and x.dtype in DTYPES
  axes = {varying_axes(a) for a in (*leaves, plan.weight)}
  return alike and x.ndim == 2 and axes == {varying_axes(x, plan)}


def kernels(
  together: Callable[..., Array],
  f: RowFunction,
  tree: Any,
  chunks: Callable,
  theta: Any,
  x: Array,
  plan: Dispatch,
) -> dict[str, Callable]:
  """Platform -> executor as `kernel_executor` makes it, where a kernel fits."""
  if not fits(x, theta, plan):
    return {}
  products: dict[str, Callable] = {"tpu": grouped_matmul}
  if on_hopper() and not varying_axes(x):
    products["cuda"] = gpu.grouped_matmul
  make = functools.partial(kernel_executor, together, f, tree, chunks)
  made = {name: make(product) for name, product in products.items()}
  return {k: run for k, run in made.items() if has_tiles(run, theta, x, plan)}


def has_tiles(run: Callable, theta, x: Array, plan: Dispatch) -> bool:
  """Whether the kernel can cut products of these sizes, and their gradients."""

  def gradients(theta, x, weight):
    made, pull = jax.vjp(
      lambda moving, x, weight: run(
        merge(moving, theta), x, plan._replace(weight=weight)
      ),
      differentiable(theta),
      x,
      weight,
    )
    return pull(made)

  try:
    jax.eval_shape(gradients, theta, x, plan.weight)
  except ValueError:
    return False
  return True


def kernel_executor(
  together: Callable[[Array, Any, Callable[[Array, Array], Array]], Array],
  f: RowFunction,
  tree: Any,
  chunks: Callable,
  product: Callable[..., Array],
) -> Callable:
  """`(theta, x, plan) -> (y, slots)` and its gradient, which `vmap` loops.

  `product` is the grouped matmul, which makes a row for every slot.  Where each
  item may run all experts it is given the slots that `kept` bounds, and if they
  are not enough `chunks`, an executor as this one, runs instead.
  """
  (out,) = f.out_avals

  def value(theta, x, plan):
    slots = kept(plan, x.shape[0])
    plan = plan._replace(item=plan.item[:slots], weight=plan.weight[:slots])
    params = jax.tree.unflatten(tree, theta[: tree.num_leaves])
    with marked(rows=slots):
      rows = together(
        spread(x, plan), params, functools.partial(product, sizes=plan.sizes)
      )
    y = combine(rows, plan, x.shape[0], out.dtype)
    return y, plan.sizes.sum().astype(jnp.float32)

  def gradient(value, theta, x, plan, dy):
    def apply(moving, x, weight):
      return value(merge(moving, theta), x, plan._replace(weight=weight))[0]

    _, pull = jax.vjp(apply, differentiable(theta), x, plan.weight)
    return pull(dy)

  def either(kernel, chunks):
    def choose(theta, x, plan, *more):
      slots = kept(plan, x.shape[0])
      if slots == plan.item.shape[0]:
        return kernel(theta, x, plan, *more)
      enough = plan.sizes.sum() <= slots
      return lax.cond(enough, kernel, chunks, theta, x, plan, *more)

    return choose

  forward = looped(either(value, chunks))
  partial = functools.partial
  backward = looped(either(partial(gradient, value), partial(gradient, chunks)))
  run = jax.custom_vjp(either(value, chunks))

  def run_forward(*args):
    return forward(*args), args

  def run_backward(args, cotangents):
    theta, _, plan = args
    dtheta, dx, dweight = backward(*args, cotangents[0])
    return with_none(dtheta, theta), dx, plan.cotangent(dweight)

  run.defvjp(run_forward, run_backward)
  return run
