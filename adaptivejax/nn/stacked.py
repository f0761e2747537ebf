# SPDX-License-Identifier: Apache-2.0
"""Modules of one shape, their parameters stacked: layers, experts.

Axes: N modules, the first axis of every array.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def stacked(
  make: Callable[[nnx.Rngs], Any],
  count: int | Callable[[Any], int],
  rngs: nnx.Rngs,
) -> Any:
  """`count` modules of the same shape as one, parameters stacked in front.

  Under a trace (`jit`, `eval_shape`) it is one `scan` that makes a module after
  the other, with the very numbers of the loop that it else is: a program of
  one module however many there are, and no copy of all before they are stacked.

  Args:
    make: makes one, `make(rngs)`, all of one form.
    count: how many, or what says so, given one of them (static).
    rngs: for the parameters.
  """
  state = nnx.state(rngs)
  traced = any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(state))
  if not traced:
    first = make(rngs)
    rest = [make(rngs) for _ in range(_many(count, first) - 1)]
    return jax.tree.map(lambda *a: jnp.stack(a), first, *rest)

  def one(state, _):
    own = nnx.merge(definition, state)
    made = make(own)
    return nnx.state(own), made

  definition = nnx.graphdef(rngs)
  form = jax.eval_shape(lambda state: one(state, None)[1], state)
  state, made = lax.scan(one, state, length=_many(count, form))
  nnx.update(rngs, state)
  return made


def _many(count: int | Callable[[Any], int], module: Any) -> int:
  number = count if isinstance(count, int) else count(module)
  if number < 1:
    raise ValueError(f"there must be at least 1 of them; got count={number}.")
  return number
