# SPDX-License-Identifier: Apache-2.0
"""Plans: which layers to run, decided before the input is seen.

A plan that will not change is baked into smaller arrays (`specialize`): nothing
is left of what it drops.  Several plans that take turns are rows of a
`PlanTable`, and one compiled body serves them all (`run_plan`), the number of
the plan being data.  A search tries thousands of plans on one program: there
each part is run or left out by a scalar (`run_if`).

Axes: L layers, G plans, K layers of the longest plan.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from adaptivejax.core.batching import looped
from adaptivejax.core.varying import vary, varying_axes

T = TypeVar("T")


def specialize(
  stacked: T, kept: Int[Array | np.ndarray, " K"] | Sequence[int]
) -> T:
  """The stack made of the layers `kept`, in that order.

  Args:
    stacked: pytree with leading axis L, such as a model's `layers`.
    kept: layer indices; which ones is data if it is an array, how many is not.

  Raises:
    ValueError: no layers, or one that is not there.
  """
  total = _layers(stacked)
  if not isinstance(kept, jax.core.Tracer):
    _check(np.asarray(kept), total)
  index = jnp.asarray(kept, jnp.int32)
  return jax.tree.map(lambda a: a[index], stacked)


class PlanTable(NamedTuple):
  """Plans that take turns.

  Attributes:
    kept: layers of each plan in the order in which they run, the last repeated
      behind the end, i32[G, K].
    count: layers of each plan, i32[G].
  """

  kept: Array
  count: Array

  @classmethod
  def of(cls, plans: Sequence[Sequence[int]], total: int) -> "PlanTable":
    """The table of `plans` for a stack of `total` layers; both are static.

    Raises:
      ValueError: no plan, or one without layers or with one that is not there.
    """
    if not len(plans):
      raise ValueError("a table needs at least one plan; got none.")
    for plan in plans:
      _check(np.asarray(plan), total)
    longest = max(map(len, plans))
    kept = [[*plan, *[plan[-1]] * (longest - len(plan))] for plan in plans]
    count = [len(plan) for plan in plans]
    return cls(jnp.asarray(kept, jnp.int32), jnp.asarray(count, jnp.int32))


def run_plan(
  layer: Callable[[Any, Array, T], T],
  stacked: Any,
  carry: T,
  table: PlanTable,
  plan: Int[Array, ""] | int,
) -> T:
  """Runs the layers of one plan, and only these.

  Args:
    layer: `(parameters of layer l, l, carry) -> carry`; compiled once.
    stacked: pytree with leading axis L.
    carry: pytree that goes from layer to layer.
    table: the plans.
    plan: which one, below G (dynamic; one for all rows).

  A loop of dynamic length, which has no reverse mode: to train under a plan,
  `specialize`.  Under `vmap` over `plan` it runs as often as the longest one.
  """

  def body(i, carry):
    l = table.kept[plan, i]
    pick = lambda a: lax.dynamic_index_in_dim(a, l, keepdims=False)
    return layer(jax.tree.map(pick, stacked), l, carry)

  return lax.fori_loop(0, table.count[plan], body, carry)


def run_if(
  keep: Bool[Array, ""],
  f: Callable[..., T],
  carry: T,
  *operands: Any,
  reverse: bool = True,
) -> T:
  """`f(carry, *operands)` if `keep`, else `carry`; one decision for all rows.

  Args:
    keep: the decision (dynamic).
    f: closes over no traced value; returns what is built like `carry`.
    carry: pytree that goes through.
    operands: pytrees that `f` reads.
    reverse: a conditional, which can be differentiated but copies the carry; or
      else a loop of one round or none, which leaves a large carry such as a
      cache in its place, and has no reverse mode (static).

  Under `vmap` over `keep` it goes through the examples one by one, so that what
  is left out is never computed.
  """
  keep, carry, operands = vary((keep, carry, operands), varying_axes(keep))

  def choose(keep, carry, operands):
    same = lambda carry, *operands: carry
    return lax.cond(keep, f, same, carry, *operands)

  if not reverse:
    return run_times(keep.astype(jnp.int32), f, carry, *operands)
  return looped(choose)(keep, carry, operands)


def run_times(
  count: Int[Array, ""], f: Callable[..., T], carry: T, *operands: Any
) -> T:
  """`f` on `carry`, `count` times over (dynamic); arguments as in `run_if`.

  A loop, which leaves a large carry in its place and has no reverse mode.
  """
  count, carry, operands = vary((count, carry, operands), varying_axes(count))

  def repeat(count, carry, operands):
    step = lambda _, carry: f(carry, *operands)
    return lax.fori_loop(0, count, step, carry)

  return looped(repeat)(count, carry, operands)


def run_anyway(
  keep: Bool[Array, ""],
  f: Callable[..., T],
  carry: T,
  *operands: Any,
  reverse: bool = True,
) -> T:
  """The dense twin of `run_if`: always computes, and keeps if `keep`."""
  del reverse
  pick = lambda a, b: jnp.where(keep, a, b)
  return jax.tree.map(pick, f(carry, *operands), carry)


def _layers(stacked: Any) -> int:
  sizes = {a.shape[0] for a in jax.tree.leaves(stacked)}
  if len(sizes) != 1:
    raise ValueError(
      "a stack needs the same leading axis, its layers, on every leaf; got"
      f" {sorted(sizes)}."
    )
  return sizes.pop()


def _check(plan: np.ndarray, total: int) -> None:
  good = plan.ndim == 1 and plan.size and 0 <= plan.min() <= plan.max() < total
  if not good:
    raise ValueError(
      f"a plan names one or more of the layers 0..{total - 1}; got"
      f" {plan.tolist()}."
    )
