# SPDX-License-Identifier: Apache-2.0
"""Cycles of a scheduled program for TPU; without a TPU.

`simulate` runs the scalar half of a schedule (`benchmarks.tpu_schedule`) with
the true values of the scalar operands, so grids and branches run as often as on
the chip.

A bundle is one cycle.  A transfer that touches HBM takes LATENCY, and then its
bytes at full bandwidth, one after the other; a wait stalls until it is done.
Bundles, visits, spills and bytes are those of the compiler.  Cycles compare
programs: contention, short transfers and instruction fetches are not modelled.
"""

import dataclasses
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.tpu_schedule import Instruction, Program

LATENCY = 0.44e-6
"""Seconds to start a transfer: what the published time of a matmul of small
tiles on v5e comes to (https://docs.jax.dev/en/latest/pallas/tpu/matmul.html)."""
GRANULE = 32
"""Bytes, the unit of transfers."""


class Operand(int):
  """The address of an operand; what is computed of it is in that operand."""


def _wrap(x: int) -> int:
  return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def _unsigned(x: int) -> int:
  return x % (1 << 32)


def _divide(a: int, b: int) -> tuple[int | None, int | None]:
  return divmod(_unsigned(a), _unsigned(b)) if b else (None, None)


_ARITHMETIC: dict[str, Callable[..., Any]] = {
  "smov": lambda *a: a[-1],
  "pmov": lambda *a: a[-1],
  "int_to_ptr": lambda *a: a[-1],
  "sadd": operator.add,
  "scalar_lea": lambda *a: sum(a),
  "ssub": operator.sub,
  "smul": lambda a, b: _wrap(a * b),
  "sshll": lambda a, b: _wrap(a << b) if a >> 36 in (0, -1) else a << b,
  "sshrl": lambda a, b: _unsigned(a) >> b,
  "sshra": operator.rshift,
  "sand": operator.and_,
  "sor": operator.or_,
  "sxor": operator.xor,
  "smin": min,
  "smax": max,
  "sdivrem": _divide,
  "pneg": operator.not_,
}
_LOGIC = {  # the value that decides alone, what it decides, what else comes
  "por": (True, True, False),
  "pnor": (True, False, True),
  "pand": (False, False, True),
  "pnand": (False, True, False),
}


def _apply(op: str, args: list[Any]) -> Any:
  """The value of an instruction; None is a value that is not known."""
  name, *kind = op.split(".")
  if name == "scalar_select":
    return None if args[0] is None else args[1] if args[0] else args[2]
  if name in _LOGIC:
    decides, value, other = _LOGIC[name]
    known = [bool(a) for a in args if a is not None]
    return value if decides in known else other if len(known) == 2 else None
  if None in args or (name != "scmp" and name not in _ARITHMETIC):
    return None
  for a in args:
    if isinstance(a, Operand):
      return a
  if "u32" in kind and name in ("scmp", "smin", "smax"):
    unsigned = [_unsigned(a) for a in args]
    if name != "scmp":
      return _wrap(_ARITHMETIC[name](*unsigned))
    args = unsigned
  if name == "scmp":
    return getattr(operator, kind[0])(*args)
  return _ARITHMETIC[name](*args)


@dataclasses.dataclass
class Run:
  """What a simulation found.

  Attributes:
    cycles: in all.
    stall: of these, waiting for transfers.
    visits: of each block.
    hbm: bytes to and from HBM.
    unknown: branches on values that are not known, which are not taken, and
      waits for what was never started; a figure with any is worth nothing.
  """

  program: Program
  cycles: float = 0.0
  stall: float = 0.0
  hbm: int = 0
  unknown: int = 0
  visits: list[int] = dataclasses.field(default_factory=list)

  @property
  def main(self) -> tuple[int, int]:
    """The block that multiplies most."""
    schedule = self.program.schedule
    work = [
      n * schedule.macs[low:high].sum()
      for n, (low, high) in zip(self.visits, schedule.blocks)
    ]
    return schedule.blocks[int(np.argmax(work))]

  @property
  def spills(self) -> int:
    """Vector registers put away in the main block."""
    return int(self.program.schedule.spills[slice(*self.main)].sum())


def simulate(
  program: Program, scalars: Sequence[Any] = (), most: int = 1_000_000
) -> Run:
  """Runs the scalar half on core 0.

  `scalars` are the values of the first operands, i32.  Raises a RuntimeError
  after `most` blocks.
  """
  machine = _Machine(program, dict(enumerate(scalars)))
  blocks = program.schedule.blocks
  index = {low: n for n, (low, _) in enumerate(blocks)}
  run = machine.run
  run.visits = [0] * len(blocks)
  block: int | None = 0
  for _ in range(most):
    if block is None:
      run.cycles = machine.time
      return run
    run.visits[block] += 1
    low, high = blocks[block]
    target = machine.block(low, high)
    block = index.get(high if target is None else target)
  raise RuntimeError(f"no end after {most} blocks")


class _Machine:
  """Registers, scalar memory, transfers on their way, and the time."""

  def __init__(self, program: Program, scalars: Mapping[int, Any]):
    self.run, self.scalars = Run(program), scalars
    self.core, self.code = program.schedule.core, program.code
    self.time = self.hbm_free = 0.0
    self.values: dict[str, Any] = {"core": 0}
    self.registers: dict[str, Any] = {}
    self.memory: dict[Any, Any] = {}
    self.flags: dict[Any, list[list[float]]] = defaultdict(list)

  def block(self, low: int, high: int) -> int | None:
    """Runs a block: the bundle it branches to, None for the next one."""
    branch = None
    for bundle in range(low, high):
      for instruction in self.code[bundle]:
        if instruction.op.startswith("sbr"):
          branch = instruction
        else:
          self.step(instruction)
      self.time += 1
    if branch is None:
      return None
    taken = self.holds(branch)
    self.run.unknown += taken is None
    return branch.target if taken else None

  def holds(self, x: Instruction) -> bool | None:
    """Whether the guard of an instruction holds."""
    if x.guard is None:
      return True
    value = self.values.get(x.guard[0])
    return None if value is None else bool(value) == x.guard[1]

  def sum(self, terms: tuple[str | int, ...]) -> Any:
    """A sum of names and numbers; an operand if one is."""
    out = 0
    for term in terms:
      value = self.values.get(term) if isinstance(term, str) else term
      if value is None or isinstance(value, (Operand, list)):
        return value
      out += value
    return out

  def step(self, x: Instruction) -> None:
    """Does what a scalar instruction does."""
    holds = self.holds(x)
    args = [self.sum(arg) for arg in x.args]
    if x.op.startswith("dma.done"):
      if holds is not False:
        self.wait(*args[:2])
    elif x.op.startswith("dma."):
      if holds is not False:
        self.transfer(x.op, *args[:4])
    elif x.op == "sst":
      if holds:
        self.memory[args[0]] = args[1]
    else:
      value = self.value(x, args)
      if holds is False:
        if not x.other:
          return
        value = self.values.get(x.other)
      self.values[x.dst] = value
      self.registers[x.dst.rpartition("_")[2]] = value

  def value(self, x: Instruction, args: list[Any]) -> Any:
    """What a scalar instruction computes."""
    if x.op in ("sphi", "pphi"):
      return self.registers.get(x.dst.rpartition("_")[2])
    if x.op == "sld":
      return 0 if "core" in x.args[-1] else self.memory.get(args[0])
    if x.op.startswith("inlined_call_operand"):
      index = x.operand
      if "<" in x.op:  # "<no memory space>": by value
        known = self.scalars.get(index)
        return None if known is None else int(np.ravel(known)[0])
      return Operand(index)
    if x.op == "spop.drf":
      return args[0].pop(0) if args[0] else None
    value = _apply(x.op, args[:2] if x.op.startswith("sdivrem") else args)
    if x.op.startswith("sdivrem") and value:
      return list(value)[1 if ("kRem",) in x.args else 0 :]
    return value

  def transfer(self, op: str, source: Any, size: Any, to: Any, flag: Any):
    """Starts a transfer of `size` granules."""
    size = size or 0
    latency, nbytes = LATENCY * self.core.clock, size * GRANULE
    if "hbm" in op:
      begin = max(self.time + latency, self.hbm_free)
      end = self.hbm_free = begin + nbytes / self.core.bandwidth
      self.run.hbm += nbytes
    else:
      end = self.time + latency / 6 + nbytes / self.core.bandwidth
    self.flags[flag].append([end, size])
    if op.endswith("to_smem") and isinstance(source, Operand):
      for n, word in enumerate(np.ravel(self.scalars.get(int(source), ()))):
        self.memory[to + n] = int(word)

  def wait(self, flag: Any, size: Any) -> None:
    """Stalls until `size` granules have come."""
    end, queue = self.time, self.flags[flag]
    self.run.unknown += not queue or not size
    while queue and size:
      end = max(end, queue[0][0])
      taken = min(size, queue[0][1])
      size -= taken
      queue[0][1] -= taken
      if not queue[0][1]:
        queue.pop(0)
    self.run.stall += end - self.time
    self.time = end
