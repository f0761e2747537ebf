# SPDX-License-Identifier: Apache-2.0
"""What `vmap` does to an executor.

`vmap` turns a conditional whose predicate is batched into a select: every
branch runs.  So executors bring rules of their own, which keep it.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from adaptivejax.core.covers import Cover


def folded(value: Callable, cover: Cover) -> Callable:
  """`value(cover, theta, x, mask)`, its batch made rows under `vmap`.

  The chunks grow with the batch.  Where operands are batched, it loops.
  """

  def rule(op, batch, batched, theta, x, mask):
    if any(batched[0]):
      return loop(op, batch, batched, theta, x, mask)
    spread = lambda a, b: a if b else jnp.broadcast_to(a, (batch, *a.shape))
    x, mask = jax.tree.map(spread, (x, mask), tuple(batched[1:]))
    n = mask.shape[1]
    fold = lambda a: a.reshape(batch * n, *a.shape[2:])
    wide = folded(value, cover.widened(batch))
    y, slots = wide(theta, [fold(a) for a in x], fold(mask))
    y = [a.reshape(batch, n, *a.shape[1:]) for a in y]
    shares = jnp.broadcast_to(slots / batch, (batch,))
    return (y, shares), ([True] * len(y), True)

  return with_rule(functools.partial(value, cover), rule)


def looped(f: Callable) -> Callable:
  """Under `vmap`: one example after the other, each with its own cover."""
  return with_rule(f, loop)


def with_rule(f: Callable, rule: Callable) -> Callable:
  """`f` batched by `rule(op, batch, batched, *args)`.

  Its derivative is that of `f`: JAX's derivative of a `custom_vmap` mixes up
  the axes where an argument is batched and its tangent is not (`hessian`).
  """
  op = custom_vmap(f)
  op.def_vmap(lambda *args: rule(op, *args))
  run = jax.custom_jvp(op)
  run.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
  return run


def loop(op, batch, batched, *args):
  """One example after the other: a batching rule that is always right."""
  flags, tree = jax.tree.flatten(tuple(batched))
  leaves = jax.tree.leaves(args)
  shared = [a for a, b in zip(leaves, flags, strict=True) if not b]

  def one(each):
    each, rest = iter(each), iter(shared)
    values = [next(each if b else rest) for b in flags]
    return op(*jax.tree.unflatten(tree, values))

  out = lax.map(one, [a for a, b in zip(leaves, flags) if b])
  return out, jax.tree.map(lambda _: True, out)
