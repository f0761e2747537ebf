# SPDX-License-Identifier: Apache-2.0
r"""`bucketed`: dense compute on a data-dependent number of rows.

XLA wants static shapes; an adaptive method decides at run time which of N
items to compute.  A cover (`core.covers`) joins the two: the selected rows are
gathered, chunk by chunk, each chunk of static size; `f` runs on it, and its
rows are scattered back.  For every mask, values and gradients equal `masked`:

    y_i = f(x_i) if mask_i else x_i

How it keeps the laws:

* Only selected rows ever enter `f`: padding repeats a selected row, its result
  is dropped and its cotangent is zero.  So NaN in the unselected cannot leak.
* The backward pass saves the inputs only and runs the same cover: each chunk
  recomputes `f` and is transposed at once.  So backward memory is that of one
  chunk, and the smaller working set pays for the recomputation; storing the
  matrix products in buffers of N rows was measured slower on CPU.
* `vmap` folds the batch into the rows, since a batched predicate would run
  every branch; where operands or gradients are per example it loops instead.
* In `shard_map` operands are made device-varying first (`core.varying`); under
  an ambient mesh each device covers its own rows (`core.per_device`).

Axes: N items, C rows of one chunk.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from adaptivejax.core.batching import folded, looped
from adaptivejax.core.chunks import Leaves, fill, run_cover, where
from adaptivejax.core.cost import Cost, jaxpr_flops
from adaptivejax.core.covers import Cover, default_cover
from adaptivejax.core.per_device import auto_axes, layout_of, on_each_device
from adaptivejax.core.rowwise import (
  RowFunction,
  differentiable,
  merge,
  trace_rows,
  with_none,
)
from adaptivejax.core.select import compact
from adaptivejax.core.varying import vary, varying_axes


def bucketed(
  f: Callable[..., Any],
  x: Any,
  mask: Bool[Array, "..."],
  *operands: Any,
  keep: bool = True,
  cover: Cover | None = None,
  most: int | None = None,
) -> tuple[Any, Cost]:
  """Applies the row-wise `f` to the selected rows, at the cost of those rows.

  Args:
    f: `f(rows, *operands) -> rows`, each row independent of the others; traced
      once per chunk size.  It may close over traced arrays.
    x: pytree of arrays whose leading axes are those of `mask`.
    mask: the selection (dynamic); all its axes are item axes.
    operands: pytrees that `f` gets whole: weights, modules.
    keep: unselected rows keep their input (then `f` must map rows to rows of
      the same shape and dtype), or else are zero (static).
    cover: chunk sizes (static); `default_cover(N)` if not given.
    most: selected rows that run at most, the first ones (static): whatever the
      mask, the work ends there; the others are as if not selected, and counted
      as dropped.  All if not given.

  Returns:
    `(y, cost)`; `y` is shaped like `x`, or like the output of `f`.

  Raises:
    ValueError: shapes, dtypes or the cover do not fit, `f` does not return one
      row per row, or it holds a collective over a mesh axis on which the
      selection differs.

  Call it under `jit`: eagerly it compiles at each call.  Work that is itself
  conditional does not belong in `f`, whose FLOPs are counted as if it were not:
  intersect the masks.  Forward mode (`jax.jvp`) and, under `jit`, reverse over
  reverse are not defined: differentiate `masked`, made of plain operations.
  Where rows are sharded over devices, call it under an ambient mesh
  (`core.per_device`) or inside `jax.shard_map`: under `jit` alone the result is
  right, but every device computes all selected rows.
  """
  _check_items(x, mask)
  if most is not None:
    return _capped(f, x, mask, operands, keep, cover, most)
  if cover is not None:
    _check_cover(cover, mask.size)
  layout = layout_of(mask.shape)
  try:
    if layout.axes:
      local = functools.partial(_local, f, keep, cover)
      return on_each_device(local, (x, mask), operands, layout)
    return _bucketed(f, x, mask, operands, keep, cover)
  except TypeError as error:
    # An eager `shard_map` cannot hash the mark that JAX puts on forward mode.
    marked = layout.axes and "unhashable type: 'list'" in str(error)
    if "forward-mode" not in str(error) and not marked:
      raise
    raise ValueError(
      "`bucketed` has no forward-mode derivative (`jvp`, `jacfwd`): use its"
      " dense twin `masked`, which takes the same arguments."
    ) from error


def _bucketed(f, x, mask, operands, keep, cover):
  cover = cover or default_cover(mask.size)
  call = _flatten(f, x, mask, operands, keep, cover.sizes)
  run = _executor(call.f, cover, keep)
  y, slots = run(call.theta, call.x, call.mask)
  return call.unflatten(y), _price(call, slots, cover.most(mask.size))


def _capped(f, x, mask, operands, keep, cover, most):
  """`bucketed` of the first `most` selected rows."""
  runs, axes = _first(mask, most), layout_of(mask.shape).axes
  parts = math.prod(auto_axes()[name] for name in axes)
  each = mask.size // parts  # on one device
  if cover is None or max(cover.sizes) > each:
    cover = default_cover(each)
  y, cost = bucketed(f, x, runs, *operands, keep=keep, cover=cover)
  slots = parts * cover.most(min(most, each))
  bound = cost.full * (slots / mask.size * (1 + 1e-6))  # rounded up
  return y, _with_dropped(cost, mask)._replace(bound=bound)


def _first(mask, most):
  """The first `most` of what is selected."""
  if most < 1:
    raise ValueError(f"{most=} must be at least 1 row; select none instead.")
  place = jnp.cumsum(mask.reshape(-1), dtype=jnp.int32).reshape(mask.shape)
  return mask & (place <= most)


def _with_dropped(cost: Cost, mask) -> Cost:
  """The cost of some of the rows that were asked for."""
  items = mask.sum(dtype=jnp.float32)
  return cost._replace(items=items, dropped=items - cost.items)


def _local(f, keep, cover, items, operands):
  """`bucketed` of the items of one device."""
  x, mask = items
  if cover is not None and max(cover.sizes) > mask.size:
    cover = None  # it was made for the items of all
  return bucketed(f, x, mask, *operands, keep=keep, cover=cover)


def masked(
  f: Callable[..., Any],
  x: Any,
  mask: Bool[Array, "..."],
  *operands: Any,
  keep: bool = True,
  most: int | None = None,
) -> tuple[Any, Cost]:
  """The dense twin of `bucketed`: computes every row, keeps the selected.

  Same arguments, values and gradients; it costs what dense costs, and every
  JAX transform applies.
  """
  _check_items(x, mask)
  if most is not None:
    y, cost = masked(f, x, _first(mask, most), *operands, keep=keep)
    return y, _with_dropped(cost, mask)
  call = _flatten(f, x, mask, operands, keep, (mask.size,))
  order, _ = compact(call.mask)
  rows = [fill(a, call.mask, order) for a in call.x]
  out = call.f.apply(rows, call.theta)
  y = [
    where(call.mask, new, old if keep else jnp.zeros_like(new))
    for new, old in zip(out, call.x if keep else out)
  ]
  slots = jnp.full_like(call.mask, mask.size, jnp.float32, shape=())
  return call.unflatten(y), _price(call, slots, mask.size)


class _Call(NamedTuple):
  """One call, flat: the items are N rows, pytrees are lists of leaves."""

  f: RowFunction
  theta: Leaves
  x: Leaves
  mask: Bool[Array, " N"]
  lead: tuple[int, ...]

  def unflatten(self, y: Leaves) -> Any:
    unfold = [a.reshape(*self.lead, *a.shape[1:]) for a in y]
    return jax.tree.unflatten(self.f.out_tree, unfold)


def _flatten(f, x, mask, operands, keep, sizes) -> _Call:
  lead, n = mask.shape, mask.size
  flat = lambda a: jnp.asarray(a).reshape(n, *a.shape[len(lead) :])
  rows, mask = jax.tree.map(flat, (x, mask))
  predicate = varying_axes(mask)
  rows = vary(rows, predicate)
  operands = vary(operands, predicate | varying_axes(rows))
  function, theta = trace_rows(f, rows, operands, sizes, predicate)
  if keep and function.out_axes - varying_axes(rows):
    rows = vary(rows, function.out_axes)  # so that both sides of `where` agree
    function, theta = trace_rows(f, rows, operands, sizes, predicate)
  if keep:
    _check_keep(function, rows)
  return _Call(function, theta, jax.tree.leaves(rows), mask, lead)


def _price(call: _Call, slots: Array, most: int) -> Cost:
  size, jaxpr = max(call.f.jaxprs.items())
  row = jaxpr_flops(jaxpr) / size
  full = jnp.full_like(slots, row * call.mask.shape[0])
  items = call.mask.sum(dtype=jnp.float32)
  none = jnp.zeros_like(slots)
  bound = jnp.float32(most) * jnp.float32(row)  # rounded as `spent` is
  return Cost(slots * row, full, items, slots, none, bound)


def _executor(f: RowFunction, cover: Cover, keep: bool) -> Callable:
  """`(theta, x, mask) -> (y, slots)` with its gradient and batching rules."""

  def blank(x, mask):
    """The result before any row is computed."""
    axes = f.out_axes | varying_axes(mask)
    shapes = [(mask.shape[0], *a.shape[1:]) for a in f.out_avals]
    zeros = [jnp.zeros(s, a.dtype) for s, a in zip(shapes, f.out_avals)]
    return vary(x if keep else zeros, axes)

  def zeros(like, dtype):
    return vary(jnp.zeros(like.shape, dtype), varying_axes(like))

  def value(cover, theta, x, mask):
    def step(chunk, y):
      return chunk.scatter(y, f.apply(chunk.gather(x), theta))

    return run_cover(cover, mask, step, blank(x, mask))

  def backward(theta, x, mask, dy):
    def step(chunk, state):
      dx, dtheta = state
      given = chunk.gather(x)

      def apply(rows, weights):
        y = f.apply(merge(rows, given), merge(weights, theta))
        return vary(y, varying_axes(dy))  # constants vary over fewer

      _, pull = jax.vjp(apply, differentiable(given), differentiable(theta))
      drows, d = pull(chunk.gather_live(dy))
      return chunk.scatter(dx, drows), [a + b for a, b in zip(dtheta, d)]

    dx = dy if keep else [zeros(a, a.dtype) for a in differentiable(x)]
    dtheta = [
      zeros(a, jnp.promote_types(a.dtype, jnp.float32))
      for a in differentiable(theta)
    ]
    (dx, dtheta), _ = run_cover(cover, mask, step, (dx, dtheta))
    narrow = zip(dtheta, differentiable(theta), strict=True)
    return [d.astype(a.dtype) for d, a in narrow], dx

  value, backward = folded(value, cover), looped(backward)
  run = jax.custom_vjp(value)

  def run_forward(theta, x, mask):
    return value(theta, x, mask), (theta, x, mask)

  def run_backward(residuals, cotangents):
    theta, x, mask = residuals
    dtheta, dx = backward(theta, x, mask, cotangents[0])
    return with_none(dtheta, theta), with_none(dx, x), None

  run.defvjp(run_forward, run_backward)
  return run


def _check_items(x: Any, mask: Array) -> None:
  dtype = getattr(mask, "dtype", type(mask).__name__)
  if dtype != jnp.bool_:
    raise ValueError(
      f"`mask` must be a boolean array, one truth per item; got {dtype}. Make"
      " one with `core.select`."
    )
  if mask.ndim == 0 or mask.size == 0:
    raise ValueError(f"`mask` must hold at least one item; got {mask.shape=}.")
  if not jax.tree.leaves(x):
    raise ValueError("`x` holds no array: there is nothing to compute on.")
  for a in jax.tree.leaves(x):
    if jnp.shape(a)[: mask.ndim] != mask.shape:
      raise ValueError(
        f"the leading axes of `x` must be those of `mask`, {mask.shape}; got an"
        f" array of shape {jnp.shape(a)}."
      )


def _check_cover(cover: Cover, n: int) -> None:
  if not isinstance(cover, Cover):
    raise ValueError(
      f"`cover` must be a `Cover`, as in `coins({n})`; got {cover!r}."
    )
  if max(cover.sizes) > n:
    raise ValueError(
      f"{cover.sizes=} holds a chunk of more than the {n} items. Make the cover"
      f" for this call, as in `default_cover({n})`."
    )


def _check_keep(f: RowFunction, rows: Any) -> None:
  given = [(a.shape[1:], a.dtype) for a in jax.tree.leaves(rows)]
  made = [(a.shape[1:], a.dtype) for a in f.out_avals]
  if jax.tree.structure(rows) != f.out_tree or given != made:
    raise ValueError(
      f"with `keep=True` `f` must map rows to rows of the same shape and dtype:"
      f" given {given} it returned {made}. Pass `keep=False` for zeros."
    )
