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
* In `shard_map` operands are made device-varying first (`core.varying`).

Axes: N items, C rows of one chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Int

from adaptivejax.core.cost import Cost, jaxpr_flops
from adaptivejax.core.covers import Cover, default_cover
from adaptivejax.core.rowwise import (
  RowFunction,
  differentiable,
  merge,
  trace_rows,
  with_none,
)
from adaptivejax.core.select import compact
from adaptivejax.core.varying import vary, varying_axes

Leaves = list[Any]


def bucketed(
  f: Callable[..., Any],
  x: Any,
  mask: Bool[Array, "..."],
  *operands: Any,
  keep: bool = True,
  cover: Cover | None = None,
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

  Returns:
    `(y, cost)`; `y` is shaped like `x`, or like the output of `f`.

  Raises:
    ValueError: shapes, dtypes or the cover do not fit, or `f` is not row-wise.

  Forward mode alone (`jax.jvp`) and reverse over reverse are not defined here:
  differentiate `masked`, which is made of plain operations.
  """
  _check_items(x, mask)
  cover = cover or default_cover(mask.size)
  _check_cover(cover, mask.size)
  call = _flatten(f, x, mask, operands, keep, cover.sizes)
  run = _executor(call.f, cover, keep)
  try:
    y, slots = run(call.theta, call.x, call.mask)
  except TypeError as error:
    if "forward-mode" not in str(error):
      raise
    raise ValueError(
      "`bucketed` has no forward-mode derivative (`jvp`, `jacfwd`): use its"
      " dense twin `masked`, which takes the same arguments."
    ) from error
  return call.unflatten(y), _price(call, slots)


def masked(
  f: Callable[..., Any],
  x: Any,
  mask: Bool[Array, "..."],
  *operands: Any,
  keep: bool = True,
) -> tuple[Any, Cost]:
  """The dense twin of `bucketed`: computes every row, keeps the selected.

  Same arguments, values and gradients; it costs what dense costs, and every
  JAX transform applies.
  """
  _check_items(x, mask)
  call = _flatten(f, x, mask, operands, keep, (mask.size,))
  order, _ = compact(call.mask)
  rows = [_fill(a, call.mask, order) for a in call.x]
  out = call.f.apply(rows, call.theta)
  y = [
    _where(call.mask, new, old if keep else jnp.zeros_like(new))
    for new, old in zip(out, call.x if keep else out)
  ]
  slots = jnp.full_like(call.mask, mask.size, jnp.float32, shape=())
  return call.unflatten(y), _price(call, slots)


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
  if keep:
    _check_keep(function, rows)
  return _Call(function, theta, jax.tree.leaves(rows), mask, lead)


def _price(call: _Call, slots: Array) -> Cost:
  size, jaxpr = max(call.f.jaxprs.items())
  row = jaxpr_flops(jaxpr) / size
  full = jnp.full_like(slots, row * call.mask.shape[0])
  items = call.mask.sum(dtype=jnp.float32)
  return Cost(slots * row, full, items, slots, jnp.zeros_like(slots))


def _executor(f: RowFunction, cover: Cover, keep: bool) -> Callable:
  """`(theta, x, mask) -> (y, slots)` with its gradient and batching rules."""

  def blank(x, mask):
    """The result before any row is computed."""
    y = (
      x
      if keep
      else [
        jnp.zeros((mask.shape[0], *a.shape[1:]), a.dtype) for a in f.out_avals
      ]
    )
    axes = [f.out_axes | varying_axes(mask)] * len(y)
    return [vary(a, b) for a, b in zip(y, axes)]

  def zeros(like, dtype):
    return vary(jnp.zeros(like.shape, dtype), varying_axes(like))

  def value(theta, x, mask):
    def step(chunk, y):
      return chunk.scatter(y, f.apply(chunk.gather(x), theta))

    return _run(cover, mask, step, blank(x, mask))

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
    (dx, dtheta), _ = _run(cover, mask, step, (dx, dtheta))
    narrow = zip(dtheta, differentiable(theta), strict=True)
    return [d.astype(a.dtype) for d, a in narrow], dx

  value, backward = _folded(value), _looped(backward)
  run = jax.custom_vjp(value)

  def run_forward(theta, x, mask):
    return value(theta, x, mask), (theta, x, mask)

  def run_backward(residuals, cotangents):
    theta, x, mask = residuals
    dtheta, dx = backward(theta, x, mask, cotangents[0])
    return with_none(dtheta, theta), with_none(dx, x), None

  run.defvjp(run_forward, run_backward)
  return run


class _Chunk(NamedTuple):
  """`size` slots of the compacted rows; slot s holds row `order[s]`."""

  size: int
  begin: Int[Array, ""]
  order: Int[Array, " N"]
  live: Bool[Array, " C"]
  mask: Bool[Array, " N"]

  @property
  def whole(self) -> bool:
    """A chunk of all rows runs on x itself: no gather, no scatter."""
    return self.size == self.mask.shape[0]

  @property
  def items(self) -> Int[Array, " C"]:
    return lax.dynamic_slice_in_dim(self.order, self.begin, self.size)

  def gather(self, x: Leaves) -> Leaves:
    """The rows of this chunk; padding repeats a selected row."""
    if self.whole:
      return [_fill(a, self.mask, self.order) for a in x]
    return [a.at[self.items].get(mode="promise_in_bounds") for a in x]

  def gather_live(self, x: Leaves) -> Leaves:
    """The rows of this chunk; padding is zero."""
    return [_where(self.live, a, jnp.zeros_like(a)) for a in self.gather(x)]

  def scatter(self, y: Leaves, rows: Leaves) -> Leaves:
    """Writes the live rows of this chunk into `y`."""
    if self.whole:
      return [_where(self.mask, new, old) for new, old in zip(rows, y)]
    n = self.mask.shape[0]
    nowhere = n + jnp.arange(self.size, dtype=jnp.int32)
    to = jnp.where(self.live, self.items, nowhere)
    write = lambda old, new: old.at[to].set(
      vary(new, varying_axes(old)), mode="drop", unique_indices=True
    )
    return [write(old, new) for old, new in zip(y, rows)]


def _run(cover: Cover, mask, step: Callable, state: Any) -> tuple[Any, Array]:
  """Runs `step(chunk, state)` over the cover; returns the state and slots."""
  order, count = compact(mask)
  n, done = mask.shape[0], jnp.zeros_like(count)
  for size, rounds in zip(cover.sizes, cover.trips(count), strict=True):

    def body(i, state, size=size, done=done):
      first = done + i * size
      begin = jnp.minimum(first, n - size)  # the last chunk may overlap
      slot = begin + jnp.arange(size, dtype=jnp.int32)
      live = mask if size == n else (slot >= first) & (slot < count)
      return step(_Chunk(size, begin, order, live, mask), state)

    # The conditional: XLA hoists the invariant part of a body out of its loop,
    # and would run it even where the loop has no rounds.
    state = lax.cond(
      rounds > 0,
      lambda s, rounds=rounds, body=body: lax.fori_loop(0, rounds, body, s),
      lambda s: s,
      state,
    )
    done += rounds * size
  return state, done.astype(jnp.float32)


def _folded(value: Callable) -> Callable:
  """Under `vmap`: the batch becomes rows, if the operands are shared."""

  def rule(op, batch, batched, theta, x, mask):
    if any(batched[0]):
      return _loop(op, batch, batched, theta, x, mask)
    spread = lambda a, b: a if b else jnp.broadcast_to(a, (batch, *a.shape))
    x, mask = jax.tree.map(spread, (x, mask), tuple(batched[1:]))
    n = mask.shape[1]
    fold = lambda a: a.reshape(batch * n, *a.shape[2:])
    y, slots = op(theta, [fold(a) for a in x], fold(mask))
    y = [a.reshape(batch, n, *a.shape[1:]) for a in y]
    shares = jnp.broadcast_to(slots / batch, (batch,))
    return (y, shares), ([True] * len(y), True)

  return _with_rule(value, rule)


def _looped(f: Callable) -> Callable:
  """Under `vmap`: one example after the other, each with its own cover."""
  return _with_rule(f, _loop)


def _with_rule(f: Callable, rule: Callable) -> Callable:
  """`f` batched by `rule(op, batch, batched, *args)`.

  Its derivative is that of `f`: JAX's derivative of a `custom_vmap` mixes up
  the axes where an argument is batched and its tangent is not (`hessian`).
  """
  op = custom_vmap(f)
  op.def_vmap(lambda *args: rule(op, *args))
  run = jax.custom_jvp(op)
  run.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
  return run


def _loop(op, batch, batched, *args):
  flags, tree = jax.tree.flatten(tuple(batched))
  leaves = jax.tree.leaves(args)
  shared = [a for a, b in zip(leaves, flags, strict=True) if not b]

  def one(each):
    each, rest = iter(each), iter(shared)
    values = [next(each if b else rest) for b in flags]
    return op(*jax.tree.unflatten(tree, values))

  out = lax.map(one, [a for a, b in zip(leaves, flags) if b])
  return out, jax.tree.map(lambda _: True, out)


def _fill(a: Array, mask: Bool[Array, " N"], order: Int[Array, " N"]) -> Array:
  """`a` with a selected row in place of the unselected (ones if none is)."""
  live = jnp.where(mask.any(), a[order[-1]], jnp.ones_like(a[0]))
  return _where(mask, a, lax.stop_gradient(live)[None])


def _where(mask: Bool[Array, " N"], a: Array, b: Array) -> Array:
  return jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)


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
