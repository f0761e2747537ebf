# SPDX-License-Identifier: Apache-2.0
"""A stack in which whole halves of layers are left out, the same for all.

Axes: L layers, B batch, T tokens, D features.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from adaptivejax.core.cost import Cost
from adaptivejax.core.plans import run_if
from adaptivejax.core.varying import vary, varying_axes
from adaptivejax.nn.block import Block
from adaptivejax.nn.stack import SAVED, StackOutput, layer_at, layer_count


def by_plan(
  layers,
  x: Float[Array, "B T D"],
  positions,
  cache=None,
  *,
  readout,
  key=None,
  plan: Bool[Array, "L 2"],
) -> StackOutput:
  """A stack that runs the halves of `plan`, for prompt and decoding alike.

  Args:
    plan: whether layer l runs its attention and its feed-forward (dynamic).

  Other arguments as in `nn.stack`.  A layer without attention writes no keys;
  it has no use for them.  `depth` counts a half as half a layer.
  """
  del readout
  if not isinstance(layers, Block):
    raise ValueError(
      f"by_plan runs the two halves of a `Block` apart; this model stacks"
      f" {type(layers).__name__}."
    )
  total = layer_count(layers)
  if plan.shape != (total, 2):
    raise ValueError(
      f"`plan` must have two halves for each of {total} layers, shape"
      f" {(total, 2)}; got {plan.shape}."
    )

  trains = cache is None
  run = functools.partial(run_if, reverse=trains)
  # weights of a half that is skipped while decoding are not even read
  pick = (lambda block, l: block) if trains else layer_at

  def attend(carry, weights, l, positions, key):
    x, cache, *_ = carry
    return pick(weights, l).attend(x, positions, cache, l, None, key)

  def feed(carry, weights, l, key):
    return pick(weights, l).feed(carry[0], None, key)

  @functools.partial(jax.checkpoint, policy=SAVED, prevent_cse=False)
  def body(carry, step):
    l, block, key, attends, feeds = step
    weights = block if trains else layers
    _, _, price, penalty = attend(carry, weights, l, positions, key)
    start = *carry, _unspent(price), _zero(penalty)
    x, cache, cost, penalty = run(
      attends, attend, start, weights, l, positions, key
    )
    _, fed, signals = feed((x,), weights, l, key)
    start = x, _unspent(fed), jax.tree.map(_zero, signals)
    x, feed_cost, signals = run(feeds, feed, start, weights, l, key)
    cost = (cost + feed_cost)._replace(bound=price.bound + fed.bound)
    return (x, cache), (cost, signals.owing(penalty))

  keys = None if key is None else jax.random.split(key, total)
  steps = jnp.arange(total, dtype=jnp.int32), layers, keys, *plan.T
  (x, cache), (cost, signals) = lax.scan(body, (x, cache), steps)
  depth = jnp.full(x.shape[:2], plan.sum(dtype=jnp.float32) / 2)
  signals = signals.mean()
  return StackOutput(x, cache, cost.total(), signals, depth, cost.share)


def _unspent(cost: Cost) -> Cost:
  """Nothing of `cost`; the work it prices is dead code, and never runs."""
  return Cost(*map(_zero, cost))._replace(full=cost.full, bound=cost.bound)


def _zero(a):
  return vary(jnp.zeros_like(a), varying_axes(a))
