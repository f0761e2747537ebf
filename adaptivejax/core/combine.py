# SPDX-License-Identifier: Apache-2.0
"""Rows of items to slots, and back: the two are each other's transpose.

    spread:   rows_m = x_{item(m)}
    combine:  y_n = sum over slots m of item n of  weight_m rows_m

On a TPU a sum over slots that scatters takes nine times as long as one that
gathers (see `pallas_kernels/grouped_matmul/tpu.py`): where the plan knows the
slots of each item (`Dispatch.place`), both directions only gather.

Axes: N items, M slots, K choices of an item.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adaptivejax.core.chunks import where
from adaptivejax.core.dispatch import Dispatch
from adaptivejax.core.varying import vary, varying_axes

GATHERS = 8
"""Rows that are gathered in the time in which one is scattered (TPU)."""


def by_row(weight: Array, rows: Array) -> Array:
  """`weight` against the rows it is of."""
  return weight.reshape(-1, *[1] * (rows.ndim - 1)).astype(rows.dtype)


def spread(x: Float[Array, "N ..."], plan: Dispatch) -> Float[Array, "M ..."]:
  """The row of each slot's item; differentiable in x."""
  return _spread(x.shape[0], x, plan)


def combine(
  rows: Float[Array, "M ..."], plan: Dispatch, items: int, dtype: Any
) -> Float[Array, "N ..."]:
  """The weighted sum of each item's slots; differentiable in rows and weights.

  Args:
    rows: of each slot; of those that are nobody's anything, NaN included.
    plan: whose they are, and their weights.
    items: N (static).
    dtype: of the result; sums are in f32 (static).
  """
  return _combine((items, dtype), rows, plan.weight, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(items, x, plan):
  del items
  return x.at[plan.item].get(mode="promise_in_bounds")


def _spread_backward(items, plan, drows):
  return _add_up(drows, None, plan, items).astype(drows.dtype), None


_spread.defvjp(lambda n, x, plan: (_spread(n, x, plan), plan), _spread_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(how, rows, weight, plan):
  items, dtype = how
  return _add_up(rows, weight, plan, items).astype(dtype)


def _combine_forward(how, *args):
  return _combine(how, *args), args


def _combine_backward(how, saved, dy):
  del how
  rows, weight, plan = saved
  wide = jnp.promote_types(rows.dtype, jnp.float32)
  own = plan.valid
  dy = dy.at[plan.item].get(mode="promise_in_bounds").astype(wide)
  drows = where(own, dy * by_row(weight, dy), jnp.zeros_like(dy))
  gain = (dy * rows.astype(wide)).reshape(dy.shape[0], -1).sum(1)
  dweight = jnp.where(own, gain, 0)
  return drows.astype(rows.dtype), dweight.astype(weight.dtype), None


_combine.defvjp(_combine_forward, _combine_backward)


def _add_up(
  rows: Array, weight: Array | None, plan: Dispatch, items: int
) -> Array:
  """The sum of each item's slots, in f32; as they are without weights.

  Rows are weighted before they are gathered: that is one more pass over them,
  but a TPU takes longer to gather the weights, which are one word each.
  """
  wide = jnp.promote_types(rows.dtype, jnp.float32)
  if weight is not None:
    rows = rows.astype(wide)
    rows *= by_row(weight, rows)
  y = vary(jnp.zeros((items, *rows.shape[1:]), wide), varying_axes(rows, plan))
  only = lambda mine, rows: where(
    mine, rows.astype(wide), jnp.zeros_like(y[:1])
  )
  place = plan.place
  if place is None or place.size > GATHERS * rows.shape[0]:
    return y.at[plan.item].add(only(plan.valid, rows))
  for slots in place.T:
    picked = rows.at[slots].get(mode="clip")
    y += only(slots < plan.sizes.sum(), picked)
  return y
