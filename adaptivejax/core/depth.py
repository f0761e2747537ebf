# SPDX-License-Identifier: Apache-2.0
"""Stacked layers with halting: run a row until it is done.

Two twins of one definition.  `depth_loop` stops as soon as every row has
halted: a `while_loop` over stacked parameters with a dynamic index, one body
to compile whatever the depth; it has no reverse mode.  `depth_scan` runs all
layers under masks, is differentiable, and returns every layer.  A row that has
halted keeps its value; layers may still run for it while others go on, so a
layer must not let rows mix (attention over a cache mixes tokens, not rows), and
must be finite, with its derivative, on values that left earlier layers.

Axes: L layers, B rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from adaptivejax.core.varying import vary, varying_axes

Layer = Callable[[Any, Any, Array, Any, Array], tuple[Array, Any]]
"""`(params_l, l, x, state, live) -> (x, state)`."""

Halt = Callable[[Any, Array, Array], Array]
"""`(l, before, after) -> bool[B]`: which rows may stop after layer l."""


class Depth(NamedTuple):
  """Where the rows stopped.

  Attributes:
    x: the value of each row after its last layer.
    depth: layers run per row, i32[B], in 1..L.
    state: what the layers carried.
    layers: `depth_scan` only: the value after every layer, [L, B, ...].
  """

  x: Array
  depth: Array
  state: Any
  layers: Array | None = None


def depth_loop(
  layer: Layer,
  params: Any,
  x: Array,
  state: Any,
  halt: Halt,
  *,
  min_depth: Int[Array, ""] | int = 1,
  axis_names: tuple[str, ...] = (),
) -> Depth:
  """Runs layers until every row has halted.

  Args:
    layer: one layer; `live` says which rows still need it.
    params: pytree stacked over L.
    x: rows on the leading axis.
    state: pytree carried through, e.g. the cache.
    halt: the decision after a layer; data, so thresholds never recompile.
    min_depth: layers that every row runs (dynamic).
    axis_names: mesh axes whose devices share collectives inside `layer`; the
      loop goes on while any of them has work (static).
  """
  total = _depth(params)
  rows = x.shape[0]

  def unfinished(carry):
    l, _, _, done, _ = carry
    pending = jnp.any(~done)
    if axis_names:
      pending = lax.pmax(pending.astype(jnp.int32), axis_names) > 0
    return (l < total) & pending

  def body(carry):
    l, x, state, done, depth = carry
    block = jax.tree.map(
      lambda a: lax.dynamic_index_in_dim(a, l, keepdims=False), params
    )
    x, state, done, depth = _step(
      layer, halt, min_depth, block, l, x, state, done, depth
    )
    return l + 1, x, state, done, depth

  start = _start(x, state, rows)
  _, x, state, _, depth = lax.while_loop(
    unfinished, body, (jnp.int32(0), *start)
  )
  return Depth(x, depth, state)


def depth_scan(
  layer: Layer,
  params: Any,
  x: Array,
  state: Any,
  halt: Halt,
  *,
  min_depth: Int[Array, ""] | int = 1,
) -> Depth:
  """The differentiable twin of `depth_loop`: same rows, depths and `x`.

  `state` agrees as far as layers do nothing for rows that are not live.
  """

  def body(carry, l_block):
    l, block = l_block
    carry = _step(layer, halt, min_depth, block, l, *carry)
    return carry, carry[0]

  start = _start(x, state, x.shape[0])
  steps = jnp.arange(_depth(params), dtype=jnp.int32)
  (x, state, _, depth), layers = lax.scan(body, start, (steps, params))
  return Depth(x, depth, state, layers)


def _start(x, state, rows):
  start = x, state, jnp.zeros(rows, bool), jnp.zeros(rows, jnp.int32)
  return vary(start, varying_axes(x))


def _step(layer, halt, min_depth, block, l, x, state, done, depth):
  new, state = layer(block, l, x, state, ~done)
  new = jnp.where(done.reshape(-1, *[1] * (x.ndim - 1)), x, new)
  stop = halt(l, x, new) & (l + 1 >= min_depth)
  depth = jnp.where(done, depth, l + 1)
  return new, state, done | stop, depth


def _depth(params: Any) -> int:
  sizes = {a.shape[0] for a in jax.tree.leaves(params)}
  if len(sizes) != 1:
    raise ValueError(
      f"`params` must be stacked over layers: every leaf needs the same leading"
      f" axis; got {sorted(sizes)}."
    )
  return sizes.pop()
