# SPDX-License-Identifier: Apache-2.0
"""Rows that finish at different times: stop paying for those that are done.

`staged_while` runs a descending ladder of while-loops: all rows at first, and
once no more than the next rung's are left, the rest of the loop runs on these
alone.  Rows move only when a rung is crossed: with a heavy state, such as a
key/value cache, gathering the live rows at every step costs more than it saves.
`masked_scan` is its differentiable twin, for a known number of steps.

Both call `step(rows, live) -> (rows, tally)`: rows that are not live must come
back as they were in everything that is read later (`freeze` helps), and what
is in `tally` is summed over the steps: `Cost`, say, or None.

Axes: B rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from adaptivejax.core.select import compact
from adaptivejax.core.varying import vary, varying_axes

Step = Callable[[Any, Bool[Array, " B"]], tuple[Any, Any]]


def default_rungs(rows: int) -> tuple[int, ...]:
  """`rows` and its halves, four rungs at most and none below 8 rows.

  Each rung compiles `step` once more, and a step of a few rows costs about what
  one row costs: the weights are read either way.
  """
  rungs = [rows]
  while len(rungs) < 4 and rungs[-1] >= 16:
    rungs.append(rungs[-1] // 2)
  return tuple(rungs)


def freeze(live: Bool[Array, " B"], new: Any, old: Any) -> Any:
  """`new` for live rows, `old` for the others; rows lead in every leaf."""

  def keep(new, old):
    return jnp.where(live.reshape(-1, *[1] * (new.ndim - 1)), new, old)

  return jax.tree.map(keep, new, old)


def staged_while(
  step: Step,
  rows: Any,
  alive: Callable[[Any], Bool[Array, " B"]],
  *,
  result: Callable[[Any], Any] = lambda rows: rows,
  rungs: tuple[int, ...] | None = None,
  axis_names: tuple[str, ...] = (),
) -> tuple[Any, Any]:
  """Steps until no row is alive, on fewer and fewer rows.

  Args:
    step: one step of all rows it is given, however many (see above).
    rows: pytree of arrays with leading axis B.
    alive: which rows need another step.
    result: what is wanted of the rows in the end; leave heavy state out.
    rungs: numbers of rows to go on with, falling, from B (static);
      `default_rungs` if not given.
    axis_names: mesh axes whose devices share collectives inside `step`; a loop
      goes on, and rows are kept, while any of them needs it (static).

  Returns:
    `(result, tally)`: the former with leading axis B, in the order of `rows`.
    Forward only; inside `shard_map` every device goes down its own ladder.
  """
  count = _leading(rows)
  rungs = default_rungs(count) if rungs is None else rungs
  if not rungs or rungs[0] != count or list(rungs) != sorted(set(rungs))[::-1]:
    raise ValueError(
      f"{rungs=} must fall strictly from the number of rows, {count}."
    )
  if rungs[-1] < 1:
    raise ValueError(f"{rungs=} must not go below 1 row.")
  moves = varying_axes(*jax.tree.leaves(rows))
  tally = _nothing(step, rows, jnp.ones(count, bool))
  rows, tally, place = vary((rows, tally, jnp.arange(count)), moves)
  out = result(rows)

  def left(rows):
    n = alive(rows).sum(dtype=jnp.int32)
    return lax.pmax(n, axis_names) if axis_names else n

  def go(state):
    rows, tally = state
    rows, spent = step(rows, alive(rows))
    return rows, jax.tree.map(jnp.add, tally, spent)

  for below in (*rungs[1:], 0):
    more = lambda state, below=below: left(state[0]) > below
    rows, tally = lax.while_loop(more, go, (rows, tally))
    out = _write(out, place, result(rows))
    if below:
      order = _live_first(alive(rows), below)
      rows, place = jax.tree.map(lambda a, i=order: a[i], (rows, place))
  return out, tally


def _write(old: Any, place: Array, new: Any) -> Any:
  return jax.tree.map(lambda a, b: a.at[place].set(b), old, new)


def _live_first(live: Bool[Array, " B"], count: int) -> Array:
  """`count` different rows, with all live ones, of which there are no more."""
  first, n = compact(live)
  rest, _ = compact(~live)
  i = jnp.arange(count)
  return jnp.where(i < n, first[:count], rest[jnp.maximum(i - n, 0)])


def masked_scan(
  step: Step,
  rows: Any,
  alive: Callable[[Any], Bool[Array, " B"]],
  *,
  steps: int,
  chunk: int = 8,
) -> tuple[Any, Any]:
  """The differentiable twin of `staged_while`, for at most `steps` steps.

  Args:
    step: as there; finite, with its derivative, on rows that are done.
    rows, alive: as there.
    steps: bound (static); rows still alive after it are cut off.
    chunk: steps that are skipped together once no row is alive (inside
      `shard_map`, on no device), and whose inside is recomputed in the backward
      pass (static).
  """
  if steps < 1 or chunk < 1:
    raise ValueError(f"{steps=} and {chunk=} must be at least 1.")
  moves = varying_axes(*jax.tree.leaves(rows))
  live = jnp.ones(_leading(rows), bool)
  tally = vary(_nothing(step, rows, live), moves)

  def one(state, _):
    rows, tally = state
    live = alive(rows)
    new, spent = step(rows, live)
    return (freeze(live, new, rows), jax.tree.map(jnp.add, tally, spent)), None

  @functools.partial(jax.checkpoint, static_argnums=1)
  def run(state, length):
    return lax.scan(one, state, length=length)[0]

  def part(state, length):
    more = alive(state[0]).any()
    if moves:  # one decision: weights' gradients are summed inside the cond
      more = lax.pmax(more.astype(jnp.int32), tuple(sorted(moves))) > 0
    return lax.cond(more, lambda s: run(s, length), lambda s: s, state)

  full, tail = divmod(steps, chunk)
  state = vary(rows, moves), tally
  state, _ = lax.scan(lambda s, _: (part(s, chunk), None), state, length=full)
  return part(state, tail) if tail else state


def _nothing(step: Callable[..., Any], *args: Any) -> Any:
  """A tally of no steps."""
  tally = jax.eval_shape(step, *args)[1]
  return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tally)


def _leading(rows: Any) -> int:
  sizes = {a.shape[0] if a.ndim else 0 for a in jax.tree.leaves(rows)}
  if len(sizes) != 1 or 0 in sizes:
    raise ValueError(
      f"every leaf of `rows` needs the same leading axis of at least one row;"
      f" got {sorted(sizes)}."
    )
  return sizes.pop()
