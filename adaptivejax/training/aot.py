# SPDX-License-Identifier: Apache-2.0
"""The programs of a config, compiled for devices that need not be here.

The real compiler of the chip makes the train step and the decode step, from
shapes alone, and its text is read: what it holds, computes, moves and sends
(`training.hlo_cost`).  A time is estimated from the peaks of the data sheet, as
if computing, memory and network each ran at theirs: no program is faster.
"""

import dataclasses
import math
import re
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adaptivejax.training.chips import Chip, devices_of
from adaptivejax.training.collectives import (
  Collective,
  branches,
  collectives,
)
from adaptivejax.training.config import TrainConfig
from adaptivejax.training.decoding import Decoding, abstract_decoding
from adaptivejax.training.hlo import Module
from adaptivejax.training.hlo_cost import Work, is_kernel, largest, work
from adaptivejax.training.kernels import Kernel, kernels
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
from adaptivejax.training.tpu_schedule import CORES, Schedule, written

SHARES = (1.0, 0.5, 0.25)
"""Of what the data could ask for, at most."""


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
    work: FLOPs and bytes, those that data decide about apart.
    collectives: what it sends.
    conditionals, loops: in the text of the program.
    kernels: what it calls beside XLA's own.
    largest: bytes, shape and origin of its largest arrays.
    seconds: least time of computing, memory and network, by name.
    trace_seconds, compile_seconds: of processor time, here.
  """

  name: str
  topology: str
  devices: int
  mesh: dict[str, int]
  memory: float
  arguments: int
  temporaries: int
  work: Work
  collectives: list[Collective]
  conditionals: int
  loops: int
  kernels: list[Kernel]
  largest: list[tuple[int, str, str]]
  seconds: dict[str, float]
  trace_seconds: float
  compile_seconds: float

  @property
  def held(self) -> int:
    """Bytes of memory."""
    return self.arguments + self.temporaries

  @property
  def fits(self) -> bool:
    return self.held <= self.memory

  @property
  def flops(self) -> float:
    """At most, whatever the data ask for."""
    return self.work.at(1.0)[0]

  def as_json(self) -> dict[str, Any]:
    """Plain values."""
    plain = dataclasses.asdict(self)
    plain["work"] = self.work._asdict()
    plain["collectives"] = [c._asdict() for c in self.collectives]
    plain["kernels"] = [k._asdict() for k in self.kernels]
    plain["shares"] = {
      str(share): dict(zip(("flops", "bytes"), self.work.at(share)))
      for share in SHARES
    }
    return plain | {"fits": self.fits}


def compile_step(
  config: TrainConfig, topology: str, schedules: Path | None = None
) -> Compiled:
  """Compiles the train step of `config` for a topology.

  `schedules` is where the compiler writes them (`tpu_schedule.ask`); with them
  the kernels of TPUs have cycles.

  Raises:
    ValueError: no such topology or compiler, the mesh does not fit it, or the
      compiler finds no room for the program.
  """
  chip, devices = devices_of(topology)
  mesh = make_mesh(config.mesh, devices)
  data, parts = config.data, config.optimizer.accumulate
  check_batch(data.batch, mesh, data.context, parts)

  def lower():
    optimizer = make_optimizer(config.optimizer, config.steps)
    where, join, state = abstract_start(config, optimizer, mesh)
    shape = config.data.batch, config.data.context + 1
    batch = _laid(jax.ShapeDtypeStruct(shape, jnp.int32), mesh, batch_spec())
    key = _laid(jax.eval_shape(lambda: jax.random.key(0)), mesh, P())
    step: Any = make_step(config, join, optimizer, where)
    return step.lower(state, batch, key)

  return _compiled("train step", lower, topology, chip, mesh, schedules)


def compile_decoding(
  config: TrainConfig,
  decoding: Decoding,
  topology: str,
  schedules: Path | None = None,
) -> Compiled:
  """Compiles one step of `decoding` with the model of `config`.

  Else as `compile_step`.
  """
  chip, devices = devices_of(topology)
  mesh = make_mesh(decoding.mesh or config.mesh, devices)

  def lower():
    step, arguments = abstract_decoding(config, decoding, mesh)
    return step.lower(*arguments)

  return _compiled("decode step", lower, topology, chip, mesh, schedules)


def places(config: TrainConfig, devices: Sequence[jax.Device]) -> list[Placed]:
  """Where each array of the state of `config` lies on these devices."""
  mesh = make_mesh(config.mesh, devices)
  data, parts = config.data, config.optimizer.accumulate
  check_batch(data.batch, mesh, data.context, parts)
  optimizer = make_optimizer(config.optimizer, config.steps)
  _, _, state = abstract_start(config, optimizer, mesh)
  return place(state, config.mesh, mesh)


def _laid(shape: jax.ShapeDtypeStruct, mesh, spec: P) -> jax.ShapeDtypeStruct:
  where = NamedSharding(mesh, spec)
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def _compiled(
  name: str,
  lower: Callable[[], jax.stages.Lowered],
  topology: str,
  chip: Chip,
  mesh: jax.sharding.Mesh,
  schedules: Path | None,
) -> Compiled:
  _schedules(None, topology, schedules)  # away with those of other programs
  began = time.process_time()
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = lower()
    traced = time.process_time()
    try:
      program = lowered.compile()
    except Exception as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      told = f"the {name} does not fit {topology}: {no_room(str(error))}"
      raise ValueError(told) from None
  took = traced - began, time.process_time() - traced
  return read(program, name, topology, chip, dict(mesh.shape), took, schedules)


def no_room(said: str) -> str:
  """In one line, what the TPU compiler says where memory is too small."""
  used = re.search(
    r"Used (\S+) of (\S+) hbm\. Exceeded hbm capacity by (\S+?)\.?\s", said
  )
  sizes = re.findall(
    r"Size: (\S+)\s+(?:Operator: [^\n]*?op_name=\"([^\"]*)\"[^\n]*\s+)?"
    r"Shape: ([^\s{]+)",
    said,
  )
  arrays = "; ".join(
    f"{shape} {size}" + (f" ({label.rpartition('jit(')[2]})" if label else "")
    for size, label, shape in sizes[:5]
  )
  room = (
    f"it needs {used[1]} of {used[2]} on a device, {used[3]} too much"
    if used
    else said.splitlines()[0]
  )
  return room + (f"; the largest arrays: {arrays}" if arrays else "")


def read(
  program: jax.stages.Compiled,
  name: str,
  topology: str,
  chip: Chip,
  mesh: dict[str, int],
  took: tuple[float, float],
  schedules: Path | None = None,
) -> Compiled:
  """What a compiled program says of itself; it took so long to make."""
  module = Module.parse(program.as_text() or "")
  memory: Any = program.memory_analysis()
  sent, done = collectives(module, mesh), work(module)
  flops, moved = done.at(1.0)
  conditionals, loops = branches(module)
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
    work=done,
    collectives=sent,
    conditionals=conditionals,
    loops=loops,
    kernels=kernels(module, _schedules(module, topology, schedules)),
    largest=largest(module),
    seconds={
      "compute": flops / chip.flops,
      "memory": moved / chip.bandwidth,
      "network": sum(c.bytes for c in sent) / chip.network,
    },
    trace_seconds=took[0],
    compile_seconds=took[1],
  )


def _schedules(
  module: Module | None, topology: str, folder: Path | None
) -> dict[str, Schedule]:
  """Of the kernels of a program, by instruction; none if it is not known."""
  core = CORES.get(topology.partition(":")[0])
  if folder is None or core is None:
    return {}
  ops = [] if module is None else module.ops()
  names = {op.name for op in ops if is_kernel(op)}
  try:
    return written(folder, core, names.__contains__)
  except ValueError as error:
    warnings.warn(f"kernels are shown without cycles: {error}", stacklevel=2)
    return {}
