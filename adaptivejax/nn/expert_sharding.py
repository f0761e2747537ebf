# SPDX-License-Identifier: Apache-2.0
"""Experts over devices: how a model is told, and how its parameters lie.

Items travel to their experts and back (`core.expert_parallel`) inside
`jax.shard_map`, where each device holds some of the experts:

    model = shard_experts(model, "expert")
    items = P(("data", "expert"))
    run = jax.shard_map(
      lambda model, x: model(x)[0],
      mesh=mesh,
      in_specs=(expert_specs(model, mesh), items),
      out_specs=items,
    )

Under `jit` alone, a model that is not told gives the right result with the same
specs as `NamedSharding`s, but at a price: the compiler cannot see that items go
where their experts are.  Every device gets the weights of all experts and the
items of every chunk, and computes all chunks.

Which layout of equal programs is best depends on the load, which
`fastest_program` tries.
"""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from adaptivejax.nn.experts import (
  ExpertSharding,
  MixtureOfExperts,
  mlp_specs,
)


def shard_experts(
  model: Any,
  axis: str | tuple[str, ...] | None,
  *,
  width: str | None = None,
  chunks: int = 1,
) -> Any:
  """The model with the experts of every mixture over mesh axes.

  Arguments are those of `ExpertSharding`.  The parameters are the same:
  `expert_specs` says how to lay them out.
  """
  model = jax.tree.map(lambda a: a, model)  # a copy
  found = mixtures(model)
  if not found:
    raise ValueError(
      f"there is no `MixtureOfExperts` in this {type(model).__name__}."
    )
  for mixture in found:
    mixture.over = ExpertSharding(axis, width, chunks)
  return model


def expert_specs(model: Any, mesh: Mesh | AbstractMesh) -> Any:
  """`PartitionSpec`s for the leaves of a model with `shard_experts`.

  Experts, and their width, are over their mesh axes; the rest is replicated.
  Layers may be stacked: their axes come before that of the experts.

  Raises:
    ValueError: a mesh axis is missing, or does not divide what is spread on it.
  """
  specs = jax.tree.map(lambda a: P(), model)
  for mixture, spec in zip(mixtures(model), mixtures(specs), strict=True):
    if mixture.over is None:
      continue
    *_, count, hidden, _ = mixture.experts.down.kernel.shape
    axis, width = mixture.over.axis, mixture.over.width
    _check_divides(mesh, axis, count, "experts")
    _check_divides(mesh, width, hidden, "hidden features")
    spec.experts = mlp_specs(mixture.experts, axis, width)
  return specs


def fastest_program(
  programs: Mapping[str, Callable[..., Any]],
  *args: Any,
  rounds: int = 3,
  clock: Callable[[], float] = time.perf_counter,
) -> str:
  """The name of the program that takes least time on `args`, of equal ones.

  Each runs once, to compile, and then `rounds` times, in turns; the best of its
  times counts.  Ask again where the load has changed.
  """
  if not programs or rounds < 1:
    raise ValueError(f"there is nothing to compare: {programs=}, {rounds=}.")
  best = dict.fromkeys(programs, math.inf)
  for name in programs:
    jax.block_until_ready(programs[name](*args))
  for name in [*programs] * rounds:
    start = clock()
    jax.block_until_ready(programs[name](*args))
    best[name] = min(best[name], clock() - start)
  return min(best, key=best.__getitem__)


def mixtures(model: Any) -> list[MixtureOfExperts]:
  """Every mixture of experts that the model holds."""
  return [
    module
    for _, module in nnx.iter_modules(model)
    if isinstance(module, MixtureOfExperts)
  ]


def _check_divides(mesh, axis, count: int, what: str) -> None:
  names = () if axis is None else (axis,) if isinstance(axis, str) else axis
  missing = [name for name in names if name not in mesh.shape]
  if missing:
    raise ValueError(
      f"the mesh has no axes {missing} to spread {what} over; it has"
      f" {dict(mesh.shape)}."
    )
  devices = math.prod(mesh.shape[name] for name in names)
  if count % devices:
    raise ValueError(
      f"{count} {what} cannot be spread evenly over the {devices} devices of"
      f" mesh axes {names}: take a number of devices that divides them."
    )
