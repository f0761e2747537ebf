# SPDX-License-Identifier: Apache-2.0
"""Stacked layers with halting: run a row until it is done.

Two twins of one definition.  `depth_loop` stops as soon as every row has
halted: a `while_loop` over stacked parameters with a dynamic index, one body
to compile whatever the depth; it has no reverse mode.  `depth_scan` runs all
layers under masks, is differentiable, and returns every layer.  A row that has
halted keeps its value and its memory; layers may still run for it while others
go on, so a layer must not let rows mix (attention over a cache mixes tokens,
not rows), and must be finite, with its derivative, on values that left earlier
layers.

A value may be a pytree: what a layer makes beside the hidden state, such as the
logits of an exit, is then there for the halting rule to read.  The rules
themselves are made of `core.halting`.

Axes: L layers, B rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from adaptivejax.core.cost import Cost, bound_of, times
from adaptivejax.core.staged import freeze
from adaptivejax.core.varying import vary, varying_axes

Layer = Callable[[Any, Any, Any, Any, Array], tuple[Any, Any]]
"""`(params_l, l, x, state, live) -> (x, state)`."""

Halt = Callable[[Any, Any, Any, Any], tuple[Array, Any]]
"""`(l, before, after, memory) -> (stop bool[B], memory)`: which rows may stop
after layer l (counted from 0), and what to remember of it."""


class Depth(NamedTuple):
  """Where the rows stopped.

  Attributes:
    x: the value of each row after its last layer.
    depth: layers run per row, i32[B], in 1..L (0 if never live).
    state: what the layers carried.
    memory: what the halting rule remembered, per row as of its last layer.
    layers: `depth_scan` only: the value after every layer, [L, B, ...].
  """

  x: Any
  depth: Array
  state: Any
  memory: Any = None
  layers: Any = None


def depth_loop(
  layer: Layer,
  params: Any,
  x: Any,
  state: Any,
  halt: Halt,
  memory: Any = None,
  *,
  live: Bool[Array, " B"] | None = None,
  min_depth: Int[Array, ""] | int = 1,
  max_depth: Int[Array, ""] | int | None = None,
  axis_names: tuple[str, ...] = (),
) -> Depth:
  """Runs layers until every row has halted.

  Args:
    layer: one layer; `live` says which rows still need it.
    params: pytree stacked over L.
    x: pytree, rows on the leading axis.
    state: pytree carried through, e.g. the cache.
    halt: the decision after a layer; data, so thresholds never recompile.
    memory: what `halt` starts from: a pytree, rows on the leading axis.
    live: rows that need anything at all; the others stay as they are, of
      depth 0.  All if not given.
    min_depth: layers that every live row runs (dynamic).
    max_depth: layers that no row runs more of, sure or not: a hard limit on the
      work, whatever the values (dynamic); L if not given.
    axis_names: mesh axes whose devices share collectives inside `layer`; the
      loop goes on while any of them has work (static).
  """
  total = _depth(params)
  span = min_depth, total if max_depth is None else max_depth

  def unfinished(carry):
    l, rows = carry
    pending = jnp.any(~rows.done)
    if axis_names:
      pending = lax.pmax(pending.astype(jnp.int32), axis_names) > 0
    return (l < total) & pending

  def body(carry):
    l, rows = carry
    block = jax.tree.map(
      lambda a: lax.dynamic_index_in_dim(a, l, keepdims=False), params
    )
    return l + 1, _step(layer, halt, span, block, l, rows)

  start = jnp.int32(0), _start(x, state, memory, live)
  _, end = lax.while_loop(unfinished, body, start)
  return Depth(end.x, end.depth, end.state, end.memory)


def depth_scan(
  layer: Layer,
  params: Any,
  x: Any,
  state: Any,
  halt: Halt,
  memory: Any = None,
  *,
  live: Bool[Array, " B"] | None = None,
  min_depth: Int[Array, ""] | int = 1,
  max_depth: Int[Array, ""] | int | None = None,
) -> Depth:
  """The differentiable twin of `depth_loop`: same depths, `x` and `memory`.

  `state` agrees as far as layers do nothing for rows that are not live.
  """
  span = min_depth, _depth(params) if max_depth is None else max_depth

  def body(rows, l_block):
    l, block = l_block
    rows = _step(layer, halt, span, block, l, rows)
    return rows, rows.x

  steps = jnp.arange(_depth(params), dtype=jnp.int32)
  end, layers = lax.scan(body, _start(x, state, memory, live), (steps, params))
  return Depth(end.x, end.depth, end.state, end.memory, layers)


def most_of_layers(
  layer: Layer,
  params: Any,
  x: Any,
  state: Any,
  max_depth: Int[Array, ""] | int | None = None,
) -> Array | float:
  """FLOPs of a `depth_loop` at most, by the `Cost` in `state`.

  It is known beforehand, unless `max_depth` is traced.
  """

  def one(block, x, state):
    fresh = lambda a: Cost.zero() if isinstance(a, Cost) else a
    state = jax.tree.map(fresh, state, is_leaf=lambda a: isinstance(a, Cost))
    live = jnp.ones(jax.tree.leaves(x)[0].shape[0], bool)
    return layer(block, jnp.int32(0), x, state, live)[1]

  first = jax.tree.map(lambda a: a[0], params)
  total = _depth(params)
  rounds = total if max_depth is None else jnp.clip(max_depth, 1, total)
  return times(bound_of(one, first, x, state), rounds)


def only_after(due: Callable[[Array], Array], halt: Halt) -> Halt:
  """`halt`, asked and paid for only after the layers l for which `due(l)`.

  After the others no row stops, and nothing is remembered.
  """

  def rule(l, before, after, memory):
    leaf = jax.tree.leaves(after)[0]
    moves = varying_axes(after, memory)
    ask = lambda: vary(halt(l, before, after, memory), moves)
    wait = lambda: vary((jnp.zeros(leaf.shape[0], bool), memory), moves)
    return lax.cond(due(l), ask, wait)

  return rule


class _Rows(NamedTuple):
  """What both twins carry from layer to layer."""

  x: Any
  state: Any
  memory: Any
  done: Array
  depth: Array


def _start(x, state, memory, live) -> _Rows:
  sizes = {jnp.shape(a)[:1] for a in jax.tree.leaves((x, memory))}
  if len(sizes) != 1 or () in sizes:
    raise ValueError(
      "every leaf of `x` and `memory` needs the same leading axis, the rows;"
      f" got {sorted(sizes)}. What belongs to no row goes into `state`."
    )
  (rows,) = sizes.pop()
  done = jnp.zeros(rows, bool) if live is None else ~live
  depth = jnp.zeros(rows, jnp.int32)
  x, state, memory = jax.tree.map(jnp.asarray, (x, state, memory))
  return vary(_Rows(x, state, memory, done, depth), varying_axes(x))


def _step(layer, halt, span, block, l, rows: _Rows) -> _Rows:
  x, state, memory, done, depth = rows
  new, state = layer(block, l, x, state, ~done)
  new = freeze(~done, new, x)
  stop, seen = halt(l, x, new, memory)
  depth = jnp.where(done, depth, l + 1)
  least, most = span
  stop = stop & (l + 1 >= least) | (l + 1 >= most)
  seen = freeze(~done, seen, memory)
  return _Rows(new, state, seen, done | stop, depth)


def _depth(params: Any) -> int:
  sizes = {a.shape[0] for a in jax.tree.leaves(params)}
  if len(sizes) != 1:
    raise ValueError(
      f"`params` must be stacked over layers: every leaf needs the same leading"
      f" axis; got {sorted(sizes)}."
    )
  return sizes.pop()
