# SPDX-License-Identifier: Apache-2.0
"""A stack whose rows leave early, each as a whole: for encoders.

After each layer a rule says which rows may leave, as in `models.classifier`,

    rule(l, said f[B, C], pooled f[B, D], memory) -> (stop bool[B], memory)

where `said` is what `readout` makes of the state.  No layer runs for a row that
left (only the small attention scores, while any row is left), and its state is
what the model goes on with: the rules of exits fit as they are.

Axes: L layers, B batch, T tokens, D features, C what the readout says.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptivejax.core.cost import Cost, Signals, flops, times
from adaptivejax.core.depth import depth_loop, most_of_layers, only_after
from adaptivejax.nn.encoder_layer import EncoderLayer
from adaptivejax.nn.exit import check_exits
from adaptivejax.nn.stack import StackOutput, checked_by, layer_count


def _check(total, *, min_depth=1, every=1, max_depth=None, **rest):
  del rest
  check_exits(total, min_depth=min_depth, every=every, max_depth=max_depth)


@checked_by(_check)
def row_exit(
  layers,
  x: Float[Array, "B T D"],
  positions: Int[Array, "B T"],
  cache=None,
  *,
  readout,
  key=None,
  rule: Callable,
  memory: Any = None,
  min_depth: Int[Array, ""] | int = 1,
  every: Int[Array, ""] | int = 1,
  max_depth: Int[Array, ""] | int | None = None,
) -> StackOutput:
  """Runs each row until the rule lets it go; forward only.

  Args:
    layers, x, positions, cache, readout, key: as in `nn.stack`.
    rule: decides for every row by itself; bind thresholds with `Partial`.
    memory: what it starts from: a pytree, rows leading, or None.  It comes back
      as `notes`.
    min_depth: layers that every row runs (dynamic).
    every: ask after each layer whose number, from 1, is a multiple of this (at
      least 1, dynamic).
    max_depth: layers that no row runs more of, sure or not (dynamic): a hard
      limit, which costs quality and never time; L if not given.

  Raises:
    ValueError: the layers are not `EncoderLayer`s.
  """
  del cache, key
  if not isinstance(layers, EncoderLayer):
    raise ValueError(
      "rows leave early between layers of type `EncoderLayer`; this model"
      f" stacks {type(layers).__name__}."
    )
  total, every = layer_count(layers), jnp.maximum(every, 1)
  there = (positions >= 0)[..., None]
  count = jnp.maximum(there.sum(1, dtype=jnp.float32), 1)

  def mean(x):
    total = jnp.where(there, x, 0).sum(1, dtype=jnp.float32)
    return (total / count).astype(x.dtype)

  due = lambda l: (l + 1 >= min_depth) & ((l + 1) % every == 0)

  def layer(block, l, x, cost, live):
    tokens = live[:, None] & (positions >= 0)
    x, _, spent, _ = block(x, positions, None, l, tokens)
    return x, cost + spent

  def leave(l, before, after, memory):
    del before
    return rule(l, readout(after), mean(after), memory)

  out = depth_loop(
    layer,
    layers,
    x,
    Cost.zero(),
    only_after(due, leave),
    memory,
    min_depth=min_depth,
    max_depth=max_depth,
  )
  ran, l = out.depth.max(), jnp.arange(total)
  asked = flops(lambda x: leave(jnp.int32(0), x, x, memory), x)
  spent = out.state.spent + asked * (due(l) & (l < ran)).sum()
  most = total if max_depth is None else jnp.clip(max_depth, 1, total)
  bound = most_of_layers(layer, layers, x, Cost.zero(), max_depth)
  cost = out.state._replace(
    spent=spent,
    full=out.state.full * total / ran,
    bound=jnp.float32(bound + times(asked, most)),
  )
  depth = jnp.broadcast_to(out.depth[:, None], positions.shape)
  shares = (l[:, None] < out.depth).mean(1, dtype=jnp.float32)
  return StackOutput(
    out.x,
    None,
    cost,
    Signals.none(),
    depth.astype(jnp.float32),
    shares,
    notes=out.memory,
  )
