# SPDX-License-Identifier: Apache-2.0
"""Stacks of encoder layers that lose tokens on the way.

Between the halves of a layer a method decides which tokens merge or go,

    decide(size f32[B, T], seen, budget) -> Decision

and all further work is on those that are left.  Budgets are numbers of tokens
or data:

* `shrinking`: so many tokens after each layer (static); arrays get shorter, and
  layers in between, where nothing changes, are scanned.
* `adapting`: how many stay depends on the input; dead slots are at the end, and
  both halves of a layer run on the rung that holds the longest row
  (`core.rungs`), so a batch pays for that one.

What comes back is `StackOutput.x`, the tokens that are left, and `notes`, the
`Tokens` themselves, by which `core.restore` finds every original token.

Axes: L layers, B batch, N original tokens, T slots, D features.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from adaptivejax.core.cost import Signals, bound_of, flops
from adaptivejax.core.plans import run_if
from adaptivejax.core.rungs import on_rung
from adaptivejax.core.token_merging import (
  Tokens,
  keep_all,
  moved,
  settle,
  settle_slots,
)
from adaptivejax.core.varying import vary, varying_axes
from adaptivejax.nn.encoder_layer import EncoderLayer
from adaptivejax.nn.stack import StackOutput, layer_at, layer_count


class Decision(NamedTuple):
  """Where tokens go.

  Attributes:
    into: slot, i32[B, T]; see `core.token_merging`.
    weight: of each in the mean of those that merge, f32[B, T].
  """

  into: Array
  weight: Array


Decide = Callable[..., Decision]
"""`decide(size, seen, budget) -> Decision`: sizes of the tokens, 0 in dead
slots, and what attention just `Seen`."""


def shrinking(
  layers,
  x,
  positions,
  decide: Decide,
  counts: tuple[int, ...],
  *,
  proportional: bool,
  remember: bool = False,
) -> StackOutput:
  """Runs all layers, with so many tokens after each attention half.

  Args:
    layers, x, positions: as for a stack.
    decide: is given, as `budget`, how many tokens there were and how many there
      are to be, two numbers (static).
    counts: tokens after each layer, not rising, from at most N (static).
    proportional: a token attracts attention in proportion to its size (static).
    remember: keep what is given up, as it entered the layer (static).
  """
  check_encoder(layers)
  total = layer_count(layers)
  tokens = Tokens.start(x, positions >= 0, remember=remember)
  whole, counts = layer_at(layers, 0).flops(x), (x.shape[1], *counts)
  costs, depth, l = [], jnp.zeros(x.shape[:2], jnp.float32), 0
  while l < total:
    end = l
    while end < total and counts[end + 1] == counts[l]:
      end += 1
    if end > l:
      tokens, cost = _unchanged(layers, tokens, l, end, proportional)
    else:
      end, layer, now = l + 1, layer_at(layers, l), counts[l : l + 2]
      tokens, cost = _reduced(layer, tokens, decide, now, proportional)
    costs.append(cost)
    depth += (end - l) * (tokens.origin >= 0)
    l = end
  cost = jax.tree.map(lambda *a: jnp.concatenate(a), *costs)
  return _output(tokens, cost, whole, depth)


def adapting(
  layers,
  x,
  positions,
  decide: Decide,
  budget,
  due: Bool[Array, " L"],
  *,
  proportional: bool,
  remember: bool = False,
) -> StackOutput:
  """Runs all layers; after some attention halves tokens are lost.

  Args:
    layers, x, positions: as for a stack.
    decide: how many tokens stay is its affair.
    budget: pytree that `decide` gets (dynamic).
    due: the layers at which it is asked (dynamic).
    proportional, remember: as in `shrinking`.
  """
  check_encoder(layers)
  tokens = Tokens.start(x, positions >= 0, remember=remember)
  whole = layer_at(layers, 0).flops(x)

  def first(x_size, layer, budget, due):
    x, size = x_size
    x, seen, cost = _mix(layer, x, size, proportional)
    stay = Decision(keep_all(size > 0), size)
    choose = lambda _, size, seen, budget: decide(size, seen, budget)
    into, weight = run_if(due, choose, stay, size, seen, budget)
    asked = flops(decide, size, seen, budget)
    bound = cost.bound + asked
    cost = cost._replace(spent=cost.spent + due * asked, bound=bound)
    return settle_slots(x, size, into, weight), cost

  def second(x, layer):
    y, cost, _ = layer.feed(x)
    return y, cost

  def body(carry, step):
    tokens, depth = carry
    layer, due = step
    (x, size, place), mixed = on_rung(
      first, (tokens.x, tokens.size), tokens.lengths, layer, budget, due
    )
    before = tokens.lengths.sum(dtype=jnp.float32)
    tokens = moved(tokens, place)._replace(x=x, size=size)
    x, fed = on_rung(second, x, tokens.lengths, layer)
    x = jnp.where(tokens.live[..., None], x, 0)
    depth += tokens.origin >= 0
    asked = 2 * before + tokens.lengths.sum(dtype=jnp.float32)
    cost = (mixed + fed)._replace(items=asked, bound=jnp.float32(most))
    return (tokens._replace(x=x), depth), cost

  one, slots = layer_at(layers, 0), (tokens.x, tokens.size)
  most = bound_of(first, slots, one, budget, due[0])  # a rung of all slots
  most += bound_of(second, tokens.x, one)
  start = tokens, jnp.zeros(x.shape[:2], jnp.float32)
  start = vary(start, varying_axes(x, positions))
  (tokens, depth), cost = lax.scan(body, start, (layers, due))
  return _output(tokens, cost, whole, depth)


def check_encoder(layers) -> None:
  """Refuses layers of another kind."""
  if not isinstance(layers, EncoderLayer):
    raise ValueError(
      "tokens can be lost between layers of type `EncoderLayer`, where every"
      f" token sees every other; got {type(layers).__name__}."
    )


def layers_due(at: Sequence[int] | Bool[Array, " L"] | None, total: int):
  """Which layers are meant, bool[L]: their numbers from 0, a mask, or all."""
  if at is None:
    return jnp.ones(total, bool)
  if getattr(at, "dtype", None) == jnp.bool_:
    mask = jnp.asarray(at)
    if mask.shape != (total,):
      raise ValueError(
        f"a mask of layers must be bool[{total}]; got {mask.shape}."
      )
    return mask
  at = [int(l) for l in at]
  bad = [l for l in at if not 0 <= l < total]
  if bad:
    raise ValueError(f"{at=} must name layers in 0..{total - 1}.")
  return jnp.zeros(total, bool).at[jnp.asarray(at, jnp.int32)].set(True)


def _mix(layer, x, size, proportional):
  bias = jnp.log(jnp.where(size > 0, size, 1)) if proportional else None
  return layer.mix(x, jnp.where(size > 0, 0, -1), bias)


def _reduced(layer, tokens, decide, counts, proportional):
  """A layer in which tokens are lost; costs as stacked over one layer."""
  x, seen, cost = _mix(layer, tokens.x, tokens.size, proportional)
  choose = lambda size, seen: decide(size, seen, counts)
  asked = flops(choose, tokens.size, seen)
  into, weight = choose(tokens.size, seen)
  tokens = settle(tokens, into, weight, x=x, count=counts[1])
  x, fed, _ = layer.feed(tokens.x)
  cost = (cost + fed).with_overhead(asked)
  return tokens._replace(x=x), jax.tree.map(lambda a: a[None], cost)


def _unchanged(layers, tokens, first, end, proportional):
  """Layers that keep all tokens; costs stacked over them."""

  def body(x, l):
    layer = layer_at(layers, l)
    x, _, cost = _mix(layer, x, tokens.size, proportional)
    x, fed, _ = layer.feed(x)
    return x, cost + fed

  body = jax.checkpoint(body, prevent_cse=False)
  x, cost = lax.scan(body, tokens.x, jnp.arange(first, end, dtype=jnp.int32))
  return tokens._replace(x=x), cost


def _output(tokens, cost, whole, depth) -> StackOutput:
  """With the price of all N tokens as what was to be paid."""
  cost = cost._replace(full=jnp.full_like(cost.full, whole))
  return StackOutput(
    tokens.x,
    None,
    cost.total(),
    Signals.none(),
    depth,
    cost.share,
    notes=tokens,
  )
