# SPDX-License-Identifier: Apache-2.0
"""A stack that a token may leave early, when decoding.

The layers it skips get keys all the same, projected from the state it left
with, so that later tokens may go deeper.  Which rows leave after which layer is
a halting rule (`core.depth.Halt`), the one thing in which methods differ.

Axes: L layers, B batch, T tokens, D features.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptivejax.core.cache import kv_propagate
from adaptivejax.core.cost import Cost, Signals, flops, times
from adaptivejax.core.depth import (
  Halt,
  depth_loop,
  most_of_layers,
  only_after,
)
from adaptivejax.nn.block import Block
from adaptivejax.nn.setting import refuse_outside
from adaptivejax.nn.stack import StackOutput, layer_at, layer_count, plain


def check_exits(
  total: int,
  *,
  min_depth: Int[Array, ""] | int = 1,
  every: Int[Array, ""] | int = 1,
  max_depth: Int[Array, ""] | int | None = None,
) -> None:
  """Refuses exits outside the `total` layers there are, unless traced."""
  there, most = "the layers there are", 1 if max_depth is None else max_depth
  refuse_outside(
    1, total, there, min_depth=min_depth, every=every, max_depth=most
  )


def early_exit(
  layers,
  x: Float[Array, "B T D"],
  positions: Int[Array, "B T"],
  cache,
  leave: Halt,
  memory: Any = None,
  *,
  readout,
  key=None,
  min_depth: Int[Array, ""] | int = 1,
  every: Int[Array, ""] | int = 1,
  max_depth: Int[Array, ""] | int | None = None,
) -> StackOutput:
  """Runs layers until every row has left; one token per row (T = 1).

  Prompts and training (T > 1, no cache) run all layers.  A row that has left
  waits, frozen, for its batch: the cost is that of the deepest row.  Padding
  (position -1) runs nothing and is waited for by nobody.

  Args:
    layers, x, positions, cache, readout, key: as in `nn.stack`.
    leave: `(l, before f[B,1,D], after f[B,1,D], memory) -> (stop bool[B],
      memory)`, asked after layer l, counted from 0, but for the last.
    memory: what `leave` starts from, rows leading.  It comes back as `notes`.
    min_depth: layers that every token runs (dynamic).
    every: ask after each layer whose number, from 1, is a multiple of this (at
      least 1, dynamic).
    max_depth: layers that no token runs more of, sure or not (dynamic): a hard
      limit, which costs quality and never time; L if not given.

  Raises:
    ValueError: the layers are not `Block`s, whose keys alone can be filled in.
  """
  if not isinstance(layers, Block):
    raise ValueError(
      "tokens leave early between layers of type `Block`, whose keys can be"
      f" filled in; this model stacks {type(layers).__name__}. Decode it with"
      " `plain`."
    )
  if cache is None or x.shape[1] > 1:
    out = plain(layers, x, positions, cache, readout=readout, key=key)
    return out._replace(notes=memory)
  total, every = layer_count(layers), jnp.maximum(every, 1)

  def due(l):
    return (l + 1 >= min_depth) & ((l + 1) % every == 0) & (l + 1 < total)

  def layer(block, l, x, state, live):
    # rows that wait run too: that writes the keys of the state they left with
    cache, cost = state
    x, cache, spent, _ = block(x, positions, cache, l)
    asked = spent.items * live.mean(dtype=jnp.float32)
    return x, (cache, cost + spent._replace(items=asked))

  live = positions[:, 0] >= 0
  rule, state = only_after(due, leave), (cache, Cost.zero())
  most = total if max_depth is None else jnp.clip(max_depth, 1, total)
  out = depth_loop(
    layer, layers, x, state, rule, memory, live=live, max_depth=most
  )
  cache, cost = out.state
  ran = out.depth.max()

  def project(l, cache):
    del cache
    return layer_at(layers, l).project_keys(out.x, positions)

  def append(cache, l, keys, rows):
    return layer_at(layers, l).attention.look.append(cache, l, keys, rows)

  cache = kv_propagate(cache, jnp.where(live, ran, total), project, append)
  l = jnp.arange(total)
  asked = flops(lambda x: leave(jnp.int32(0), x, x, memory), x)
  fill = flops(
    lambda b, x: b.project_keys(x, positions), layer_at(layers, 0), x
  )
  spent = asked * (due(l) & (l < ran)).sum() + fill * (total - ran)
  bound = most_of_layers(layer, layers, x, state, max_depth)
  bound += times(asked, most) + fill * (total - most)
  cost = cost._replace(
    spent=cost.spent + spent,
    full=cost.full * total / jnp.maximum(ran, 1),
    bound=jnp.float32(bound),  # a layer that is left out only fills in keys
  )
  depth = out.depth[:, None].astype(jnp.float32)
  shares = (l < ran).astype(jnp.float32)
  return StackOutput(
    out.x, cache, cost, Signals.none(), depth, shares, notes=out.memory
  )
