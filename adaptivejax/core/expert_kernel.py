# SPDX-License-Identifier: Apache-2.0
"""All experts at once by the grouped-matmul kernel: how a TPU runs them.

The slots are gathered, sorted by expert as they are, every matrix product of
the layer is one grouped product over all slots, and the rows are added up by
item.  What is nobody's reaches nothing, as in `core.expert_executor`.

Axes: N items, M slots, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from adaptivejax.core.batching import looped
from adaptivejax.core.chunks import where
from adaptivejax.core.expert_executor import by_row, fold_items
from adaptivejax.core.rowwise import (
  RowFunction,
  differentiable,
  merge,
  with_none,
)
from adaptivejax.core.varying import varying_axes
from pallas_kernels.grouped_matmul import grouped_matmul

DTYPES = (jnp.bfloat16, jnp.float32)


def fits(x: Array, params: Any, *more: Array) -> bool:
  """Whether the kernel takes these arrays: one dtype, and not in `shard_map`.

  There the tiles of `core.expert_executor` run: the kernel does not say over
  which mesh axes its result varies.
  """
  dtypes = {a.dtype for a in jax.tree.leaves((x, params))}
  alike = len(dtypes) == 1 and x.dtype in DTYPES and x.ndim == 2
  return alike and not varying_axes(x, params, more)


def has_tiles(run: Callable, theta, x, weight, *plan: Array) -> bool:
  """Whether the kernel can cut products of these sizes, and their gradients."""

  def gradients(theta, x, weight):
    (y, _), pull = jax.vjp(
      lambda moving, x, weight: run(merge(moving, theta), x, weight, *plan),
      differentiable(theta),
      x,
      weight,
    )
    return pull((y, jnp.float32(0)))

  try:
    jax.eval_shape(gradients, theta, x, weight)
  except ValueError:
    return False
  return True


def kernel_executor(
  together: Callable[[Array, Any, Callable[[Array, Array], Array]], Array],
  f: RowFunction,
  tree: Any,
  *,
  interpret: bool = False,
) -> Callable:
  """`(theta, x, weight, item, sizes) -> (y, slots)`, gradient and batching."""
  (out,) = f.out_avals
  wide = jnp.promote_types(out.dtype, jnp.float32)

  def value(theta, x, weight, item, sizes):
    product = functools.partial(
      grouped_matmul, sizes=sizes, interpret=interpret
    )
    params = jax.tree.unflatten(tree, theta[: tree.num_leaves])
    rows = together(x.at[item].get(mode="promise_in_bounds"), params, product)
    own = jnp.arange(item.shape[0]) < sizes.sum()
    rows = where(own, rows, jnp.zeros_like(rows)).astype(wide)
    rows = rows * by_row(jnp.where(own, weight, 0), rows)
    y = jnp.zeros((x.shape[0], *out.shape[1:]), wide).at[item].add(rows)
    return y.astype(out.dtype), sizes.sum().astype(jnp.float32)

  def backward(theta, x, weight, item, sizes, dy):
    def apply(moving, x, weight):
      return value(merge(moving, theta), x, weight, item, sizes)[0]

    _, pull = jax.vjp(apply, differentiable(theta), x, weight)
    return pull(dy)

  batched, backward = fold_items(value), looped(backward)
  run = jax.custom_vjp(batched)

  def run_forward(*args):
    return batched(*args), args

  def run_backward(args, cotangents):
    dtheta, dx, dweight = backward(*args, cotangents[0])
    return with_none(dtheta, args[0]), dx, dweight, None, None

  run.defvjp(run_forward, run_backward)
  return run
