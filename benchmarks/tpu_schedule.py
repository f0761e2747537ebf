# SPDX-License-Identifier: Apache-2.0
"""Programs for TPU as scalar programs; without a TPU.

The scalar half of a schedule (`adaptivejax.training.tpu_schedule`) is a
complete program, with counters, predicates, branches, the start and the wait of
each transfer; `compile_for` reads it, and `benchmarks.tpu_simulator` runs it.

`prepare` comes before anything that loads libtpu.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from adaptivejax.training.tpu_schedule import (
  Core,
  Schedule,
  ask,
  must_find,
  target,
  written,
)


def prepare() -> None:
  """Asks libtpu for its schedules; JAX is to run on the CPU."""
  ask()
  jax.config.update("jax_platforms", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def compile_for(
  core: Core, f: Callable[..., Any], *args: Any
) -> list["Program"]:
  """The operations of `jit(f)(*args)` that multiply matrices.

  `args` are arrays or `ShapeDtypeStruct`s.
  """
  prepare()
  device = topologies.get_topology_desc(
    platform="tpu", topology_name=core.topology
  ).devices[:1]
  place = jax.sharding.SingleDeviceSharding(device[0])
  mesh = jax.sharding.Mesh(np.array(device), ("chip",))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells the chip
    lowered = jax.jit(f, in_shardings=place).lower(*args)
  lowered.compile()
  schedules = written(ask(), core).values()
  return [Program.of(s) for s in schedules if s.macs.any()]


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A scalar instruction: `dst = op args`, if `guard`, else `other`."""

  dst: str
  op: str
  args: tuple[tuple[str | int, ...], ...]  # each a sum
  guard: tuple[str, bool] | None
  other: str | None
  text: str

  GUARD = re.compile(r"\((!?)%(\w+)(?:, %(\w+))?\),?")
  TERM = re.compile(r"%(\w+)|#(allocation\w+)|(0x[0-9a-f]+|-?\d+)|(core|kRem)")

  @classmethod
  def parse(cls, text: str) -> "Instruction | None":
    """None for all that no scalar depends on."""
    match = re.match(r"%(\w+) = ([\w.<]+)\s*(.*)", text, re.S)
    if not match:
      return None
    dst, op, rest = match.groups()
    scalar = re.search(r"_[sp]\d+$", dst)
    if not scalar and not op.startswith(("sst", "sbr", "dma", "sdivrem")):
      return None
    # Notes in brackets: "[thread:$0]", and where an address lies, "1 [#x]".
    rest = re.sub(r"\[\w+:\$\w+\]|(?<=\w) \[#\w+\]", "", rest)
    guard, other = None, None
    if condition := cls.GUARD.search(rest):
      negated, name, other = condition.groups()
      guard = name, not negated
      rest = rest.replace(condition[0], "")
    if op == "sst":  # "[address] value"
      rest = rest.replace("] ", "], ", 1)
    args = tuple(cls._sum(arg) for arg in rest.split(","))
    return cls(dst, op, args, guard, other, text)

  @property
  def target(self) -> int:
    """The bundle that a branch goes to."""
    return target(self.text)

  @property
  def operand(self) -> int:
    """The index of the operand that it reads."""
    return int(must_find(r"index: (\d+), kind", self.text)[1])

  @classmethod
  def _sum(cls, text: str) -> tuple[str | int, ...]:
    """Names and numbers to add up."""
    terms = []
    for name, allocation, number, mark in cls.TERM.findall(text):
      if number:
        value = int(number, 0)
        terms.append(value - (1 << 32) if value >> 31 == 1 else value)
      elif allocation:
        digits = re.findall(r"\d+", allocation)[0]
        terms.append((int(digits) + 1) << 40)
      else:
        terms.append(name or mark)
    return tuple(terms)


@dataclasses.dataclass(frozen=True)
class Program:
  """A schedule whose scalar half can be run.

  Attributes:
    schedule: itself.
    code: for each bundle its scalar instructions, in an order that defines
      before it uses.
  """

  schedule: Schedule
  code: list[list[Instruction]]

  @classmethod
  def of(cls, schedule: Schedule) -> "Program":
    """Reads its scalar half."""
    parse = lambda parts: _ordered(filter(None, map(Instruction.parse, parts)))
    return cls(schedule, [parse(parts) for parts in schedule.bundles])


def _ordered(instructions: Iterable[Instruction]) -> list[Instruction]:
  """Phis read what was there before; others what their bundle defines."""
  left = sorted(instructions, key=lambda x: x.op not in ("sphi", "pphi"))
  out = []
  while left:
    waits = {x.dst for x in left}
    free = [
      x
      for x in left
      if x.op in ("sphi", "pphi")
      or waits.isdisjoint({t for arg in x.args for t in arg} - {x.dst})
    ]
    out.append((free or left)[0])
    left.remove(out[-1])
  return out
