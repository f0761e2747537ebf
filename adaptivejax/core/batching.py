# SPDX-License-Identifier: Apache-2.0
"""What `vmap` does to an executor.

`vmap` turns a conditional whose predicate is batched into a select: every
branch runs.  So executors bring rules of their own, which keep it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

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

  Its derivative is that of `f`, in either order: `grad(vmap)` differentiates
  what the rule made of the batch, and `vmap(grad)` batches what `f` itself has
  for a derivative.  `custom_vmap` has no reverse mode, and inside of
  `custom_jvp` the batch would reach the derivative before the rule is asked.
  """

  def run(*args):
    leaves, tree = jax.tree.flatten(args)
    closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    out = jax.tree.structure(shapes)
    flat = _ruled.bind(
      *closed.consts, *leaves, jaxpr=closed.jaxpr, rule=rule, trees=(tree, out)
    )
    return jax.tree.unflatten(out, flat)

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


_ruled = Primitive("with_rule")
_ruled.multiple_results = True


@_ruled.def_impl
def _run(*args, jaxpr, **_):
  count = len(jaxpr.constvars)
  return jax.core.eval_jaxpr(jaxpr, args[:count], *args[count:])


@_ruled.def_effectful_abstract_eval
def _shapes(*_, jaxpr, **__):
  return [v.aval for v in jaxpr.outvars], jaxpr.effects


def _differentiate(primals, tangents, **how):
  moving = [not isinstance(t, ad.Zero) for t in tangents]

  def at(*values):
    fresh = iter(values)
    args = [next(fresh) if m else a for a, m in zip(primals, moving)]
    return _run(*args, **how)

  pick = lambda a: [each for each, m in zip(a, moving, strict=True) if m]
  return jax.jvp(at, pick(primals), pick(tangents))


def _batch(args: Sequence[Any], dims: Sequence[Any], *, jaxpr, rule, trees):
  batch = next(a.shape[d] for a, d in zip(args, dims) if d is not None)
  front = lambda a, d: a if d is None else jnp.moveaxis(a, d, 0)
  args = [front(a, d) for a, d in zip(args, dims)]
  batched, count = [d is not None for d in dims], len(jaxpr.constvars)

  def op(consts, *values):
    leaves = jax.tree.leaves(values)
    how = {"jaxpr": jaxpr, "rule": rule, "trees": trees}
    return jax.tree.unflatten(trees[1], _ruled.bind(*consts, *leaves, **how))

  tree = trees[0]
  split = lambda a: (a[:count], *jax.tree.unflatten(tree, a[count:]))
  if any(batched[:count]):  # a rule knows nothing of what `f` closes over
    out = loop(op, batch, split(batched), *split(args))
  else:
    call = functools.partial(op, args[:count])
    out = rule(call, batch, split(batched)[1:], *split(args)[1:])
  values, flags = map(jax.tree.leaves, out)
  return values, [0 if b else None for b in flags]


ad.primitive_jvps[_ruled] = _differentiate
batching.primitive_batchers[_ruled] = _batch
mlir.register_lowering(_ruled, mlir.lower_fun(_run, multiple_results=True))
