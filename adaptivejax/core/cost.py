# SPDX-License-Identifier: Apache-2.0
"""What a computation really spent, as data, and what it can spend at most.

`Cost` is a monoid: layers add, batches add, shards `psum`.  Its FLOPs are those
of matrix products and convolutions (2 m n k), counted on the jaxpr of the very
function that runs, so nobody has to keep a formula beside the code.

Work that follows from data can be driven up by whoever gives the data.  So each
cost holds its `bound`, which follows from shapes and static settings alone:
`worst_case` tells it before anything runs.

`Signals` is its differentiable sibling: what a budget loss may push on.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.interpreters import partial_eval
from jaxtyping import Array, Float


class Cost(NamedTuple):
  """Compute spent by an adaptive operation; every field is f32[].

  Attributes:
    spent: FLOPs really executed, padding included.
    full: FLOPs of the dense twin.
    items: items the decision asked for.
    capacity: slots executed for them, padding included.
    dropped: items asked for and not served (0 wherever we are exact).
    bound: FLOPs that `spent` cannot exceed, whatever the values: every layer,
      the top of every cover, all that a list has room for.
  """

  spent: Float[Array, "..."]
  full: Float[Array, "..."]
  items: Float[Array, "..."]
  capacity: Float[Array, "..."]
  dropped: Float[Array, "..."]
  bound: Float[Array, "..."]

  def __add__(self, other: "Cost") -> "Cost":  # pyrefly: ignore[bad-override]
    return jax.tree.map(jnp.add, self, other)

  @property
  def share(self) -> Float[Array, "..."]:
    """Realised share of the dense twin's compute; 1 where it has none."""
    return jnp.where(
      self.full > 0, self.spent / jnp.where(self.full > 0, self.full, 1), 1.0
    )

  @classmethod
  def zero(cls) -> "Cost":
    """The cost of doing nothing where nothing was to be done."""
    return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))

  @classmethod
  def dense(cls, flops: float, items: int) -> "Cost":
    """The cost of a dense operation: all `flops` for all `items`."""
    fields = (flops, flops, items, items, 0, flops)
    return cls(*(jnp.asarray(field, jnp.float32) for field in fields))

  def with_overhead(self, flops: Float[Array, "..."] | float) -> "Cost":
    """And `flops` that the dense twin has not: a router's, a teacher's.

    They follow from shapes alone.
    """
    return self._replace(spent=self.spent + flops, bound=self.bound + flops)

  def total(self) -> "Cost":
    """Sums stacked costs (a leading layer or step axis) to scalars."""
    return jax.tree.map(jnp.sum, self)


class Signals(NamedTuple):
  """Differentiable by-products of a layer, and what it has to tell.

  Attributes:
    share: soft share of compute of the adaptive part, 1 where nothing adapts,
      f32[].
    penalty: the method's own auxiliary loss, 0 where it has none, f32[].
    load: items that each expert got, f32[E], for each mixture of experts.
    choices: experts that each item got, f32[*N], likewise.
  """

  share: Float[Array, "..."]
  penalty: Float[Array, "..."]
  load: tuple[Float[Array, "... E"], ...] = ()
  choices: tuple[Float[Array, "..."], ...] = ()

  @classmethod
  def none(cls) -> "Signals":
    """The signals of a layer that does not adapt."""
    return cls(jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32))

  def owing(self, penalty: Float[Array, "..."]) -> "Signals":
    """With a penalty more."""
    return self._replace(penalty=self.penalty + penalty)

  def mean(self) -> "Signals":
    """Of stacked signals (a leading layer axis); what they tell stays as is."""
    return self._replace(share=self.share.mean(), penalty=self.penalty.mean())

  @staticmethod
  def join(signals: Sequence["Signals"]) -> "Signals":
    """Of different layers that count as one: means, and all that they tell."""
    mean = lambda values: jnp.stack(list(values)).mean()
    return Signals(
      mean(s.share for s in signals),
      mean(s.penalty for s in signals),
      tuple(load for s in signals for load in s.load),
      tuple(choices for s in signals for choices in s.choices),
    )


def flops(f: Callable[..., Any], *args: Any) -> float:
  """FLOPs of the matrix products and convolutions of `f(*args)`.

  Args:
    f: a traceable function.
    args: arrays or `jax.ShapeDtypeStruct`s; only their shapes matter.

  Returns:
    A Python float.  A conditional counts its dearest branch, a loop of unknown
    length one round: conditional work is priced by the `Cost` it returns.
  """
  return jaxpr_flops(jax.make_jaxpr(f)(*args).jaxpr)


def worst_case(f: Callable[..., Any], *args: Any) -> float:
  """The `bound` of the one `Cost` that `f(*args)` returns, before it runs.

  Args:
    f: a traceable function; the cost is it, or a field or item of it.
    args: arrays or `jax.ShapeDtypeStruct`s; only their shapes matter.

  Raises:
    ValueError: none or several costs, or a bound that depends on values: a hard
      limit such as `max_depth` that is an argument, or the devices of a mesh.
  """
  bound = bound_of(f, *args)
  if not isinstance(bound, float):
    raise ValueError(
      "the bound of this cost depends on values, so it is not known before it"
      " runs: close over the limits that it depends on, as Python numbers."
    )
  return bound


def bound_of(f: Callable[..., Any], *args: Any) -> Any:
  """As `worst_case`, a traced number where the bound depends on a limit."""

  def bound(*args):
    leaves = jax.tree.leaves(f(*args), is_leaf=lambda x: isinstance(x, Cost))
    costs = [leaf for leaf in leaves if isinstance(leaf, Cost)]
    if len(costs) != 1:
      raise ValueError(
        f"there must be one `Cost` in what is returned, to be bounded; got"
        f" {len(costs)}. Return, or add up, those that are meant."
      )
    return costs[0].bound

  closed = jax.make_jaxpr(bound)(*args)
  jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True])
  needed = [a for a, use in zip(jax.tree.leaves(args), used) if use]
  if not needed and not _over_mesh(jaxpr):
    with jax.ensure_compile_time_eval():
      (known,) = jax.core.eval_jaxpr(jaxpr, closed.consts)
    if not isinstance(known, jax.core.Tracer):
      return float(np.asarray(known).sum())
  if any(isinstance(a, jax.ShapeDtypeStruct) for a in needed):
    return needed[0]
  return jax.core.eval_jaxpr(jaxpr, closed.consts, *needed)[0]


def _over_mesh(jaxpr: jex.Jaxpr) -> bool:
  """Whether it adds up over devices, which only the program can."""
  return any(
    eqn.primitive.name == "shard_map"
    or any(map(_over_mesh, subjaxprs(eqn.params)))
    for eqn in jaxpr.eqns
  )


def times(bound: Any, rounds: Any) -> Any:
  """The bound of a loop; each of its sums in f32 may round up by 2^-24."""
  return bound * rounds * (1 + 1e-6 + rounds * 2.0**-24)


def jaxpr_flops(jaxpr: jex.Jaxpr) -> float:
  """`flops` of a jaxpr that is already at hand."""
  return float(sum(_equation_flops(eqn) for eqn in jaxpr.eqns))


def _equation_flops(eqn: jex.JaxprEqn) -> float:
  name, params = eqn.primitive.name, eqn.params
  inputs: list[Any] = [atom.aval for atom in eqn.invars]
  outputs: list[Any] = [var.aval for var in eqn.outvars]
  if name == "dot_general":
    (contract, _), _ = params["dimension_numbers"]
    depth = math.prod(inputs[0].shape[i] for i in contract)
    return 2.0 * outputs[0].size * depth
  if name.startswith("ragged_dot"):
    return 2.0 * outputs[0].size * inputs[0].shape[-1]
  if name == "conv_general_dilated":
    kernel = inputs[1]
    out_features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * outputs[0].size * kernel.size / out_features
  if name == "cond":
    return max(jaxpr_flops(branch.jaxpr) for branch in params["branches"])
  rounds = params["length"] if name == "scan" else 1
  if name == "shard_map":  # its body is that of one device
    sizes = params["mesh"].shape
    rounds = math.prod(sizes[name] for name in params["newly_manual_axes"])
  return rounds * sum(jaxpr_flops(sub) for sub in subjaxprs(params))


def subjaxprs(params: dict[str, Any]) -> list[jex.Jaxpr]:
  """The jaxprs that an equation holds: bodies and branches."""
  values = [
    value
    for param in params.values()
    for value in (param if isinstance(param, tuple | list) else [param])
  ]
  # With jax 0.11 a closed jaxpr is a jaxpr, too: each is to count once.
  return [
    value.jaxpr if isinstance(value, jex.ClosedJaxpr) else value
    for value in values
    if isinstance(value, (jex.ClosedJaxpr, jex.Jaxpr))
  ]
