# SPDX-License-Identifier: Apache-2.0
"""Nested computation: an item runs the first `level` of M blocks.

The blocks nest, so every level is a prefix of the next: the sum over the blocks
below an item's level (`level_apply`), or the first entries of wider weights
(`prefix_slice`, matryoshka style).

Axes: N items, M blocks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from adaptivejax.core.buckets import bucketed
from adaptivejax.core.cost import Cost
from adaptivejax.core.varying import vary, varying_axes


def level_apply(
  f: Callable[..., Any],
  x: Array,
  level: Int[Array, "..."],
  blocks: Any,
) -> tuple[Array, Cost]:
  """Sums `f(x_n, blocks[i])` over i < level[n], at the cost of those blocks.

  Args:
    f: row-wise, `f(rows, block) -> rows`.
    x: items on the leading axes of `level`.
    level: blocks to run per item, in 0..M (dynamic); beyond M means all.
    blocks: pytree of stacked parameters with leading axis M.

  Returns:
    `(y, cost)`; an item of level 0 gets zero.  Level M everywhere is the dense
    sum; see `split_hidden` for blocks that add up to a given layer.
  """
  sizes = {a.shape[0] for a in jax.tree.leaves(blocks)}
  if len(sizes) != 1:
    raise ValueError(
      f"every leaf of `blocks` needs the same leading axis, the number of"
      f" blocks; got {sorted(sizes)}."
    )
  count = sizes.pop()

  def step(i_block):
    i, block = i_block
    return bucketed(f, x, level > i, block, keep=False)

  first = jax.tree.map(lambda a: a[0], blocks)
  like, price = jax.eval_shape(lambda: step((0, first)))
  wide = jnp.promote_types(like.dtype, jnp.float32)  # a sum of M roundings
  zero = lambda a, dtype: vary(jnp.zeros(a.shape, dtype), varying_axes(a))
  start = zero(like, wide), jax.tree.map(lambda a: zero(a, a.dtype), price)

  def body(carry, i_block):
    return jax.tree.map(jnp.add, carry, step(i_block)), None

  (y, cost), _ = lax.scan(body, start, (jnp.arange(count), blocks))
  return y.astype(like.dtype), cost


def prefix_slice(tree: Any, widths: Any) -> Any:
  """The leading part of every array: a narrower network inside a wider one.

  Args:
    tree: pytree of arrays.
    widths: same structure, a tuple per array with one entry per axis, the
      entries kept of that axis or None for all of it (static).

  Raises:
    ValueError: a width is below 1 or above its axis.
  """

  def cut(a, width):
    wanted = tuple(n if w is None else w for n, w in zip(a.shape, width))
    bad = len(width) != a.ndim or any(
      not 1 <= w <= n for n, w in zip(a.shape, wanted)
    )
    if bad:
      raise ValueError(
        f"{width=} does not fit an array of shape {a.shape}: give one entry in"
        " 1..axis, or None, per axis."
      )
    return a[tuple(slice(w) for w in wanted)]

  is_width = lambda w: isinstance(w, tuple)
  flat = jax.tree.leaves(widths, is_leaf=is_width)
  leaves, tree_def = jax.tree.flatten(tree)
  cuts = [cut(a, w) for a, w in zip(leaves, flat, strict=True)]
  return jax.tree.unflatten(tree_def, cuts)
