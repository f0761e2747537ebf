# SPDX-License-Identifier: Apache-2.0
"""The train step of a config, compiled for devices that need not be here.

The real compiler of the chip makes the program, and says what it holds and
sends; a time is estimated from the peaks of the data sheet, as if computing,
memory and network each ran at theirs: no program is faster.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adaptivejax.training.chips import Chip, devices_of
from adaptivejax.training.collectives import (
  Collective,
  collectives,
  conditionals,
  kernels,
)
from adaptivejax.training.config import TrainConfig
from adaptivejax.training.mesh import (
  Placed,
  batch_spec,
  check_batch,
  make_mesh,
  place,
)
from adaptivejax.training.optimizer import make_optimizer
from adaptivejax.training.placement import abstract_start
from adaptivejax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler said of one program, of one device.

  Attributes:
    name: of the program.
    topology: what it is compiled for.
    devices: how many.
    mesh: devices along each axis.
    memory: bytes of HBM there are.
    arguments: bytes of the state and the batch.
    temporaries: bytes beside them while it runs.
    flops: as the compiler counts them: of a conditional the dearest branch, of
      a loop one round where it does not know how many.
    bytes: that it reads and writes.
    collectives: what it sends.
    branches: conditionals and loops in the text of the program.
    kernels: custom calls of kernels.
    seconds: least time of computing, memory and network, by name.
    compile_seconds: tracing and compiling, here.
  """

  name: str
  topology: str
  devices: int
  mesh: dict[str, int]
  memory: float
  arguments: int
  temporaries: int
  flops: float
  bytes: float
  collectives: list[Collective]
  branches: int
  kernels: dict[str, int]
  seconds: dict[str, float]
  compile_seconds: float

  @property
  def fits(self) -> bool:
    return self.arguments + self.temporaries <= self.memory

  def as_json(self) -> dict[str, Any]:
    """Plain values."""
    sent = [c._asdict() for c in self.collectives]
    plain = dataclasses.asdict(self) | {"collectives": sent}
    return plain | {"fits": self.fits}


def compile_step(config: TrainConfig, topology: str) -> Compiled:
  """Compiles the train step of `config` for a topology.

  Raises:
    ValueError: no such topology or compiler, or the mesh does not fit it.
  """
  chip, devices = devices_of(topology)
  began = time.perf_counter()
  mesh = make_mesh(config.mesh, devices)
  check_batch(config.data.batch, mesh)
  optimizer = make_optimizer(config.optimizer, config.steps)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    where, join, state = abstract_start(config, optimizer, mesh)
    shape = config.data.batch, config.data.context + 1
    batch = jax.ShapeDtypeStruct(
      shape, jnp.int32, sharding=NamedSharding(mesh, batch_spec())
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(
      key.shape, key.dtype, sharding=NamedSharding(mesh, P())
    )
    step: Any = make_step(config, join, optimizer, where)
    program = step.lower(state, batch, key).compile()
  took = time.perf_counter() - began
  return read(program, "train step", topology, chip, dict(mesh.shape), took)


def places(config: TrainConfig, devices: Sequence[jax.Device]) -> list[Placed]:
  """Where each array of the state of `config` lies on these devices."""
  mesh = make_mesh(config.mesh, devices)
  check_batch(config.data.batch, mesh)
  optimizer = make_optimizer(config.optimizer, config.steps)
  _, _, state = abstract_start(config, optimizer, mesh)
  return place(state, config.mesh, mesh)


def read(
  program: jax.stages.Compiled,
  name: str,
  topology: str,
  chip: Chip,
  mesh: dict[str, int],
  compile_seconds: float,
) -> Compiled:
  """What a compiled program says of itself."""
  hlo = program.as_text() or ""
  memory: Any = program.memory_analysis()
  costs: Any = program.cost_analysis() or {}
  sent = collectives(hlo, mesh)
  flops, moved = costs.get("flops", 0.0), costs.get("bytes accessed", 0.0)
  return Compiled(
    name=name,
    topology=topology,
    devices=math.prod(mesh.values()),
    mesh=mesh,
    memory=chip.memory,
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    flops=flops,
    bytes=moved,
    collectives=sent,
    branches=conditionals(hlo),
    kernels=dict(kernels(hlo)),
    seconds={
      "compute": flops / chip.flops,
      "memory": moved / chip.bandwidth,
      "network": sum(c.bytes for c in sent) / chip.network,
    },
    compile_seconds=compile_seconds,
  )
