# SPDX-License-Identifier: Apache-2.0
"""Cycles of programs for TPU, read from the compiler's schedule; without a TPU.

libtpu holds the whole compiler and compiles ahead of time on any machine.  It
can be told to write the final schedule of each operation: bundles of
instructions, one a cycle, with every latency filled in.  The scalar half of a
schedule is a complete program: counters, predicates, branches, the start and
the wait of each transfer.  `simulate` runs that half with the true values of
the scalar operands, so grids and branches run as often as on the chip.

A bundle is one cycle.  A transfer that touches HBM takes LATENCY, and then its
bytes at full bandwidth, one after the other; a wait stalls until it is done.
Bundles, visits, spills and bytes are those of the compiler.  Cycles compare
programs: contention, short transfers and instruction fetches are not modelled.

`prepare` comes before anything that loads libtpu.
"""

import atexit
import dataclasses
import functools
import itertools
import operator
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

LATENCY = 0.44e-6
"""Seconds to start a transfer: what the published time of a matmul of small
tiles on v5e comes to (https://docs.jax.dev/en/latest/pallas/tpu/matmul.html)."""
GRANULE = 32
"""Bytes, the unit of transfers."""
DELAY_SLOTS = 4
"""Bundles that still run after a taken branch."""
FILES = "packed-bundles-post-ra", "static-per-bundle-utilization"


@dataclasses.dataclass(frozen=True)
class Chip:
  """What is compiled for, and one core of it.

  `macs` are bf16 multiply-adds in a cycle, `bandwidth` is HBM bytes in one.
  """

  topology: str
  version: pltpu.ChipVersion
  cores: int
  rows_per_cycle: int  # that a matrix unit takes in

  @property
  def info(self) -> pltpu.TpuInfo:
    """The figures of its data sheet."""
    return pltpu.get_tpu_info_for_chip(self.version, self.cores)

  @property
  def macs(self) -> int:
    units, side = self.info.num_mxus, self.info.mxu_column_size
    return units * side**2 * self.rows_per_cycle

  @property
  def clock(self) -> float:
    """Cycles per second, of the peak."""
    return self.info.bf16_ops_per_second / (2 * self.macs)

  @property
  def bandwidth(self) -> float:
    return self.info.mem_bw_bytes_per_second / self.clock


CHIPS = {
  "v5e": Chip("v5e:2x2", pltpu.ChipVersion.TPU_V5E, 1, 1),
  "v5p": Chip("v5p:2x2x1", pltpu.ChipVersion.TPU_V5P, 2, 1),
  "v6e": Chip("v6e:2x2", pltpu.ChipVersion.TPU_V6E, 1, 2),
}


@functools.cache
def prepare() -> Path:
  """Asks libtpu for its schedules; the folder it writes them into."""
  folder = tempfile.mkdtemp(prefix="tpu_schedule_")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  flags = {
    "dump_to": folder,
    "dump_llo_text": "true",
    "dump_hlo_text": "true",
    "dump_llo_pass_label_regex": "packed-bundles-post-ra|pre-delay_hlo",
  }
  text = " ".join(f"--xla_jf_{key}={value}" for key, value in flags.items())
  old = os.environ.get("LIBTPU_INIT_ARGS", "")
  os.environ["LIBTPU_INIT_ARGS"] = f"{old} {text}".strip()
  jax.config.update("jax_platforms", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  return Path(folder)


def compile_for(
  chip: Chip, f: Callable[..., Any], *args: Any
) -> list["Program"]:
  """The operations of `jit(f)(*args)` that multiply matrices.

  `args` are arrays or `ShapeDtypeStruct`s.
  """
  folder = prepare()
  device = topologies.get_topology_desc(
    platform="tpu", topology_name=chip.topology
  ).devices[:1]
  place = jax.sharding.SingleDeviceSharding(device[0])
  mesh = jax.sharding.Mesh(np.array(device), ("chip",))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells the chip
    lowered = jax.jit(f, in_shardings=place).lower(*args)
  lowered.compile()
  texts = defaultdict(dict)
  for file in folder.iterdir():
    for kind in FILES:
      pattern = rf"(.+)-\d\d-(pre-delay_hlo-)?{kind}\.txt"
      if found := re.fullmatch(pattern, file.name):
        texts[found[1]][kind] = file.read_text()
    file.unlink()
  programs = [
    Program.parse(chip, *(t[kind] for kind in FILES)) for t in texts.values()
  ]
  return [program for program in programs if program.macs.any()]


# -- Reading


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
    found = re.match(r"%(\w+) = ([\w.<]+)\s*(.*)", text, re.S)
    if not found:
      return None
    dst, op, rest = found.groups()
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
  """The schedule of one operation.

  Attributes:
    code: for each bundle its scalar instructions, in an order that defines
      before it uses.
    macs: multiply-adds of each bundle, i64[bundles].
    spills: vector registers put away by each, i64[bundles].
    blocks: (first bundle, bundle after the last).
  """

  chip: Chip
  code: list[list[Instruction]]
  macs: np.ndarray
  spills: np.ndarray
  blocks: list[tuple[int, int]]

  @classmethod
  def parse(cls, chip: Chip, bundles: str, utilization: str) -> "Program":
    """Of the two files that libtpu writes for an operation."""
    code, macs, starts = [], [], {0}
    for body in _bundles(bundles):
      parts = [part.strip() for part in body.split(";;")]
      rows = sum(_rows(part) for part in parts)
      macs.append(rows * chip.info.mxu_column_size**2)
      code.append(_ordered(filter(None, map(Instruction.parse, parts))))
      for instruction in code[-1]:
        if instruction.op.startswith("sbr"):
          starts |= {_target(instruction), len(code) + DELAY_SLOTS}
    cuts = sorted(s for s in starts if s < len(code)) + [len(code)]
    lines = re.findall(r"^\d[\d ]+$", utilization, re.M)
    spills = np.zeros(len(code), int)
    spills[: len(lines)] = [int(line.split()[8]) for line in lines]
    return cls(chip, code, np.array(macs), spills, [*itertools.pairwise(cuts)])


def _bundles(text: str) -> Iterator[str]:
  """The text of each bundle, without comments that mean nothing."""
  text = re.sub(r"/\* (core) id \*/|/\* (kRem) \*/", r", \1\2", text)
  text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
  head = r"^ *(?:0x[0-9a-f]+|0) (?:[A-Z]{2})? *:[> ]*\{"
  for body in re.split(head, text, flags=re.M)[1:]:
    yield body.rpartition("}")[0]


def _rows(instruction: str) -> int:
  """Rows that go into a matrix unit: two to a word of bf16."""
  found = re.search(r"= vmatmul\S*", instruction)
  return 0 if not found else 16 if "bf16" in found[0] else 8


def _ordered(instructions: Iterator[Instruction]) -> list[Instruction]:
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


def _found(pattern: str | re.Pattern[str], text: str) -> re.Match[str]:
  """What must be there."""
  found = re.search(pattern, text)
  if found is None:
    raise ValueError(f"not a schedule as we know them: no {pattern} in {text}")
  return found


def _target(branch: Instruction) -> int:
  return int(_found(r"target bundleno = (\d+)", branch.text)[1])


# -- Running


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
    macs = self.program.macs
    work = [
      n * macs[low:high].sum()
      for n, (low, high) in zip(self.visits, self.program.blocks)
    ]
    return self.program.blocks[int(np.argmax(work))]

  @property
  def spills(self) -> int:
    """Vector registers put away in the main block."""
    return int(self.program.spills[slice(*self.main)].sum())


def simulate(
  program: Program, scalars: Sequence[Any] = (), most: int = 1_000_000
) -> Run:
  """Runs the scalar half on core 0.

  `scalars` are the values of the first operands, i32.  Raises a RuntimeError
  after `most` blocks.
  """
  machine = _Machine(program, dict(enumerate(scalars)))
  index = {low: n for n, (low, _) in enumerate(program.blocks)}
  run = machine.run
  run.visits = [0] * len(program.blocks)
  block: int | None = 0
  for _ in range(most):
    if block is None:
      run.cycles = machine.time
      return run
    run.visits[block] += 1
    low, high = program.blocks[block]
    target = machine.block(low, high)
    block = index.get(high if target is None else target)
  raise RuntimeError(f"no end after {most} blocks")


class _Machine:
  """Registers, scalar memory, transfers on their way, and the time."""

  def __init__(self, program: Program, scalars: Mapping[int, Any]):
    self.run, self.chip, self.scalars = Run(program), program.chip, scalars
    self.code = program.code
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
    return _target(branch) if taken else None

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
      index = int(_found(r"index: (\d+), kind", x.text)[1])
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
    latency, nbytes = LATENCY * self.chip.clock, size * GRANULE
    if "hbm" in op:
      begin = max(self.time + latency, self.hbm_free)
      end = self.hbm_free = begin + nbytes / self.chip.bandwidth
      self.run.hbm += nbytes
    else:
      end = self.time + latency / 6 + nbytes / self.chip.bandwidth
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
