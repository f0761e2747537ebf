# SPDX-License-Identifier: Apache-2.0
"""The first bad operation of a step that is not finite.

The step is traced and its operations run one by one, into loops, branches and
adaptive operations, until one makes NaN out of none.  `jax_debug_nans` names a
loop as a whole, and not what is in it; `checkify` does not enter the library's
own operations (`core.batching`); neither sees what overflows.

An operation may make NaN that a mask throws away later: the first is where to
look first.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jaxtyping import PyTree

CALLS = {
  "jit": "jaxpr",
  "pjit": "jaxpr",
  "closed_call": "call_jaxpr",
  "checkpoint": "jaxpr",
  "remat2": "jaxpr",
  "custom_jvp_call": "call_jaxpr",
  "custom_vjp_call": "call_jaxpr",
  "custom_vmap_call": "call",
  "with_rule": "jaxpr",  # `core.batching`
}
"""Operations that run one program once, and which of their settings it is."""

Where = tuple[str, ...]


class Place(NamedTuple):
  """An operation, and the rounds of the loops around it."""

  eqn: JaxprEqn
  where: Where

  def __str__(self) -> str:
    eqn, where = self.eqn, ", ".join(self.where)
    kinds = ", ".join(str(v.aval) for v in eqn.invars)
    source = source_info_util.summarize(eqn.source_info, num_frames=2)
    frames = " from ".join(reversed(source.splitlines()))
    stack = str(eqn.source_info.name_stack)
    gradient = ", in the gradient" if "transpose" in stack else ""
    inside = f", in {where}" if where else ""
    return f"`{eqn.primitive.name}` of {kinds} at {frames}{gradient}{inside}"


class _Found(Exception):
  """An operation that makes NaN."""


def first_bad_operation(
  step: Callable[..., Any], state: PyTree, *args: PyTree
) -> str:
  """What first makes NaN in `step(state, *args)`, in words.

  Else, what first makes an infinity of finite numbers.
  """
  for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    if _has(jnp.isnan, leaf) or _has(jnp.isinf, leaf):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      return f"{name.strip('/')} is not finite before it"
  closed = jax.make_jaxpr(step)(state, *args)
  walk = _Walk()
  try:
    walk.run(closed, jax.tree.leaves((state, *args)), ())
  except _Found as found:
    after = f"; before it, infinity from {walk.overflow}"
    return f"NaN first from {found}{after if walk.overflow else ''}"
  if walk.overflow:
    return f"infinity first from {walk.overflow}; nothing makes NaN"
  return (
    "its operations are finite when they run one by one; the compiled step"
    " rounds differently. Lower optimizer.learning_rate"
  )


class _Walk:
  """Runs programs operation by operation."""

  overflow: Place | None = None
  """The first that makes an infinity of finite numbers."""

  def run(self, program: Any, args: Sequence[Any], where: Where) -> list[Any]:
    """The results of a program."""
    jaxpr, consts = _open(program)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
    read = lambda v: v.val if isinstance(v, Literal) else env[v]
    for eqn, dead in _with_last_uses(jaxpr):
      values = self._do(eqn, [read(v) for v in eqn.invars], where)
      env |= dict(zip(eqn.outvars, values))
      for variable in dead:
        env.pop(variable, None)
    return [read(v) for v in jaxpr.outvars]

  def _do(self, eqn: JaxprEqn, args: list[Any], where: Where) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
      return self.run(params[CALLS[name]], args, where)
    if name == "cond":
      last = len(params["branches"]) - 1
      branch = min(max(int(args[0]), 0), last)
      return self.run(params["branches"][branch], args[1:], where)
    if name == "while":
      return self._while(params, args, where)
    if name == "scan":
      return self._scan(eqn, args, where)
    with eqn.ctx.manager:
      bound = eqn.primitive.get_bind_params(params)
      made = eqn.primitive.bind(*args, **bound)
    made = list(made) if eqn.primitive.multiple_results else [made]
    self._judge(Place(eqn, where), args, made)
    return made

  def _judge(self, place: Place, args: list[Any], made: list[Any]) -> None:
    any_of = lambda test, values: any(_has(test, value) for value in values)
    if any_of(jnp.isnan, made) and not any_of(jnp.isnan, args):
      raise _Found(str(place))
    if self.overflow is None and any_of(jnp.isinf, made):
      bad = any_of(jnp.isinf, args) or any_of(jnp.isnan, args)
      self.overflow = None if bad else place

  def _while(self, params, args: list[Any], where: Where) -> list[Any]:
    asks, does = params["cond_nconsts"], params["body_nconsts"]
    ask, do, carry = args[:asks], args[asks : asks + does], args[asks + does :]
    turn = 0
    while bool(self.run(params["cond_jaxpr"], [*ask, *carry], where)[0]):
      inside = (*where, f"round {turn} of a loop")
      carry = self.run(params["body_jaxpr"], [*do, *carry], inside)
      turn += 1
    return list(carry)

  def _scan(self, eqn: JaxprEqn, args: list[Any], where: Where) -> list[Any]:
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    jaxpr, reverse = _open(body)[0], eqn.params["reverse"]
    rows = _longer(eqn.invars, jaxpr.invars)  # what a round gets a row of
    kept = len(jaxpr.outvars) - _longer(eqn.outvars, jaxpr.outvars)
    fixed = len(args) - rows - kept
    consts, carry, xs = args[:fixed], args[fixed : -rows or None], args[-rows:]
    xs, found = xs if rows else [], []
    for i in reversed(range(length)) if reverse else range(length):
      inside = (*where, f"round {i} of a scan of {length}")
      made = self.run(body, [*consts, *carry, *(x[i] for x in xs)], inside)
      carry = made[:kept]
      found.append(made[kept:])
    if not found:
      empty: list[Any] = [v.aval for v in eqn.outvars[kept:]]
      return [*carry, *(jnp.zeros(a.shape, a.dtype) for a in empty)]
    if reverse:
      found.reverse()
    return [*carry, *(jnp.stack(column) for column in zip(*found))]


def _longer(outer: Sequence[Any], inner: Sequence[Any]) -> int:
  """Variables that have one axis more outside of a scan: the last ones."""
  rank = lambda variable: len(variable.aval.shape)
  return sum(rank(a) > rank(b) for a, b in zip(outer, inner, strict=True))


def _open(program: Any) -> tuple[Jaxpr, Sequence[Any]]:
  if isinstance(program, ClosedJaxpr):
    return program.jaxpr, program.consts
  return program, ()


def _with_last_uses(jaxpr: Jaxpr) -> Iterator[tuple[JaxprEqn, list[Any]]]:
  """Each operation, and the variables that none after it reads."""
  needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
  out = []
  for eqn in reversed(jaxpr.eqns):
    read = {v for v in eqn.invars if not isinstance(v, Literal)}
    out.append((eqn, [v for v in {*read, *eqn.outvars} if v not in needed]))
    needed |= read
  return reversed(out)


def _has(test: Callable, value: Any) -> bool:
  dtype = getattr(value, "dtype", None)
  return (
    dtype is not None
    and jnp.issubdtype(dtype, jnp.inexact)
    and bool(jnp.any(test(value)))
  )
