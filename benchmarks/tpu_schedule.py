# SPDX-License-Identifier: Apache-2.0
"""Programs for TPU as the compiler schedules them; without a TPU.

libtpu holds the whole compiler and compiles ahead of time on any machine.  It
can be told to write the final schedule of each operation: bundles of
instructions, one a cycle, with every latency filled in.  `compile_for` reads
them.  The scalar half of a schedule is a complete program, with counters,
predicates, branches, the start and the wait of each transfer, and
`benchmarks.tpu_simulator` runs it.

`prepare` comes before anything that loads libtpu.
"""

import atexit
import dataclasses
import functools
import itertools
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

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

  @property
  def target(self) -> int:
    """The bundle that a branch goes to."""
    return int(_found(r"target bundleno = (\d+)", self.text)[1])

  @property
  def operand(self) -> int:
    """The index of the operand that it reads."""
    return int(_found(r"index: (\d+), kind", self.text)[1])

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
          starts |= {instruction.target, len(code) + DELAY_SLOTS}
    cuts = sorted(s for s in starts if s < len(code)) + [len(code)]
    lines = re.findall(r"^\d[\d ]+$", utilization, re.M)
    spills = np.zeros(len(code), int)
    spills[: len(lines)] = [int(line.split()[8]) for line in lines]
    return cls(chip, code, np.array(macs), spills, [*itertools.pairwise(cuts)])


def _bundles(text: str) -> Iterator[str]:
  """The text of each bundle, without comments that mean nothing."""
  text = re.sub(r"/\* (core) id \*/|/\* (kRem) \*/", r", \1\2", text)
  text = re.sub(r"/\*.*?\*/", "", text)
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


def _found(pattern: str, text: str) -> re.Match[str]:
  """What must be there."""
  found = re.search(pattern, text)
  if found is None:
    raise ValueError(f"not a schedule as we know them: no {pattern} in {text}")
  return found
