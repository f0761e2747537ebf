# SPDX-License-Identifier: Apache-2.0
"""How stacked layers are run.

A *stack* is a function `stack(layers, x, positions, cache, *, readout, key)`
that returns a `StackOutput`.  `plain` is the ordinary one; depth methods are
others, and a model takes any of them.  Bind thresholds with
`jax.tree_util.Partial`, which is a pytree: they are data.  Which ones fit says
`checked_by`.

Axes: L layers, B batch, T tokens, D features, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array

from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import Cost, Signals
from adaptivejax.nn.setting import refuse_nan

Stack = Callable[..., Any]
"""`stack(layers, x, positions, cache, *, readout, key) -> StackOutput`."""

SAVED = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
"""What a layer keeps for its backward pass; a scan would store everything."""


class StackOutput(NamedTuple):
  """What came out of the layers.

  Attributes:
    x: f[B, T, D].
    cache: with every layer's keys appended, not yet advanced; or None.
    cost: total over layers.
    signals: mean over layers.
    depth: layers run per token, f32[B, T].
    shares: realised share of compute of every layer, f32[L].
    hidden: `x` after every layer, f[L, B, T, D], from `every_layer` only.
    notes: what else a stack has to say, to whoever knows it.
  """

  x: Array
  cache: KVCache | None
  cost: Cost
  signals: Signals
  depth: Array
  shares: Array
  hidden: Array | None = None
  notes: Any = None


def checked_by(check: Callable[..., None]) -> Callable[[Stack], Stack]:
  """Decorates a stack with what its settings must be.

  `check(total, **settings)`, with the number of stacked layers and all keyword
  arguments, raises ValueError for settings that do not fit; those that are
  traced it must let pass.  It is asked at every call, which sees them unless
  the call is compiled, and by `check_stack`, before it is.
  """

  def decorate(stack):
    @functools.wraps(stack)
    def checked(layers, *args, **settings):
      check(layer_count(layers), **settings)
      return stack(layers, *args, **settings)

    vars(checked)["check"] = check
    return checked

  return decorate


def check_stack(stack, layers) -> None:
  """Raises ValueError if what is bound to `stack` does not fit `layers`."""
  args, settings = (), {}
  while hasattr(stack, "keywords"):  # a partial, or JAX's box around one
    args, settings = stack.args + args, {**stack.keywords, **settings}
    stack = stack.func
  refuse_nan(arguments=args, **settings)
  if check := getattr(stack, "check", None):
    check(layer_count(layers), **settings)


def layer_count(layers) -> int:
  """Number of stacked layers."""
  return jax.tree.leaves(layers)[0].shape[0]


def layer_at(layers, index):
  """One layer out of the stack (dynamic index)."""
  pick = lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False)
  return jax.tree.map(pick, layers)


def every_layer(layers, x, positions, cache=None, *, readout, key=None):
  """Runs all layers and also returns the hidden state after each."""
  del readout
  count = layer_count(layers)
  keys = None if key is None else jax.random.split(key, count)

  @functools.partial(jax.checkpoint, policy=SAVED, prevent_cse=False)
  def body(carry, step):
    x, cache = carry
    layer, i, key = step
    x, cache, cost, signals = layer(
      x, positions, cache, i * layers.depth, None, key
    )
    return (x, cache), (x, cost, signals)

  steps = layers, jnp.arange(count, dtype=jnp.int32), keys
  (x, cache), (hidden, cost, signals) = lax.scan(body, (x, cache), steps)
  mean = signals.mean()
  depth = jnp.full(x.shape[:2], count * layers.depth, jnp.float32)
  return StackOutput(x, cache, cost.total(), mean, depth, cost.share, hidden)


def run_layers(layers, x, positions, cache, indices):
  """Runs some of the layers in the order given; they are not copied.

  Args:
    layers, x, positions, cache: as for a stack.
    indices: which layers, i32[K]; how many is static, which ones is data.

  Returns:
    `(x, cache, cost, signals)`, the last two stacked over K.
  """

  def body(carry, index):
    x, cache = carry
    layer = layer_at(layers, index)
    x, cache, cost, signals = layer(x, positions, cache, index * layers.depth)
    return (x, cache), (cost, signals)

  (x, cache), (cost, signals) = lax.scan(body, (x, cache), indices)
  return x, cache, cost, signals


def present(layers, x, positions, cache=None, *, readout, key=None):
  """Runs all layers on the tokens that are there, padding left out.

  `plain` computes padding like any token; here it costs nothing, which pays
  where most of a batch is padding.
  """
  del readout
  count = layer_count(layers)
  keys = None if key is None else jax.random.split(key, count)
  live = positions >= 0

  def body(carry, step):
    x, cache = carry
    layer, i, key = step
    x, cache, cost, signals = layer(
      x, positions, cache, i * layers.depth, live, key
    )
    return (x, cache), (cost, signals)

  steps = layers, jnp.arange(count, dtype=jnp.int32), keys
  (x, cache), (cost, signals) = lax.scan(body, (x, cache), steps)
  mean = signals.mean()
  depth = count * layers.depth * live.astype(jnp.float32)
  return StackOutput(x, cache, cost.total(), mean, depth, cost.share)


def plain(layers, x, positions, cache=None, *, readout, key=None):
  """Runs all layers, one after the other."""
  out = every_layer(layers, x, positions, cache, readout=readout, key=key)
  return out._replace(hidden=None)


FULL = Partial(plain)
"""The stack that runs all layers, as data."""
