# SPDX-License-Identifier: Apache-2.0
"""Programs for TPU as the compiler schedules them; without a TPU.

libtpu holds the whole compiler and compiles ahead of time on any machine.  It
can be told to write the final schedule of each operation: bundles of
instructions, one a cycle, with every latency filled in.  Of a kernel that is
all there is to read: XLA does not look into it.
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

import numpy as np
from jax.experimental.pallas import tpu as pltpu

DELAY_SLOTS = 4
"""Bundles that still run after a taken branch."""
FILES = "packed-bundles-post-ra", "static-per-bundle-utilization"


@dataclasses.dataclass(frozen=True)
class Core:
  """One core of a chip.

  Attributes:
    topology: the smallest there is.
    version: of the chip.
    cores: of a chip.
    rows_per_cycle: that a matrix unit takes in.
  """

  topology: str
  version: pltpu.ChipVersion
  cores: int
  rows_per_cycle: int

  @property
  def info(self) -> pltpu.TpuInfo:
    """The figures of its data sheet."""
    return pltpu.get_tpu_info_for_chip(self.version, self.cores)

  @property
  def macs(self) -> int:
    """Multiply-adds of bf16 in a cycle, at most."""
    units, side = self.info.num_mxus, self.info.mxu_column_size
    return units * side**2 * self.rows_per_cycle

  @property
  def clock(self) -> float:
    """Cycles per second, of the peak."""
    return self.info.bf16_ops_per_second / (2 * self.macs)

  @property
  def bandwidth(self) -> float:
    """Bytes of HBM in a cycle."""
    return self.info.mem_bw_bytes_per_second / self.clock


CORES = {
  "v5e": Core("v5e:2x2", pltpu.ChipVersion.TPU_V5E, 1, 1),
  "v5p": Core("v5p:2x2x1", pltpu.ChipVersion.TPU_V5P, 2, 1),
  "v6e": Core("v6e:2x2", pltpu.ChipVersion.TPU_V6E, 1, 2),
}
"""Of the chips whose schedules are understood."""


@functools.cache
def ask() -> Path:
  """Asks libtpu for its schedules; the folder it writes them into.

  Comes before anything that loads libtpu.
  """
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
  return Path(folder)


def written(
  folder: Path, core: Core, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, "Schedule"]:
  """What libtpu has written there since the last call; it is deleted.

  Args:
    folder: that `ask` returned.
    core: that was compiled for.
    wanted: the instructions that are read, by name.

  Raises:
    ValueError: they are not as we know them.
  """
  texts: dict[str, dict[str, str]] = defaultdict(dict)
  for file in sorted(folder.iterdir()):
    for kind in FILES:
      pattern = rf"\d+-(.+)-\d\d-(pre-delay_hlo-)?{kind}\.txt"
      name = re.fullmatch(pattern, file.name)
      if name and wanted(name[1]):
        texts[name[1]][kind] = file.read_text()
    file.unlink()
  return {
    name: Schedule.parse(core, *(text[kind] for kind in FILES))
    for name, text in texts.items()
    if set(FILES) <= text.keys()
  }


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The schedule of one operation.

  Attributes:
    core: that it is made for.
    bundles: the instructions of each, as written.
    macs: multiply-adds of each, i64[bundles].
    spills: vector registers put away by each, i64[bundles].
    blocks: (first bundle, bundle after the last).
    loops: likewise, from the target of a branch back to its end.
  """

  core: Core
  bundles: list[list[str]]
  macs: np.ndarray
  spills: np.ndarray
  blocks: list[tuple[int, int]]
  loops: list[tuple[int, int]]

  @classmethod
  def parse(cls, core: Core, text: str, utilization: str) -> "Schedule":
    """Of the two files that libtpu writes for an operation."""
    bundles, macs, starts, loops = [], [], {0}, []
    for body in _bundles(text):
      bundles.append([part.strip() for part in body.split(";;")])
      rows = sum(map(_rows, bundles[-1]))
      macs.append(rows * core.info.mxu_column_size**2)
      for instruction in bundles[-1]:
        if re.search(r"= sbr\b", instruction):
          goes, ends = target(instruction), len(bundles) + DELAY_SLOTS
          starts |= {goes, ends}
          loops += [(goes, ends)] if goes < len(bundles) else []
    cuts = sorted(s for s in starts if s < len(bundles)) + [len(bundles)]
    lines = re.findall(r"^\d[\d ]+$", utilization, re.M)
    spills = np.zeros(len(bundles), int)
    spills[: len(lines)] = [int(line.split()[8]) for line in lines]
    blocks = [*itertools.pairwise(cuts)]
    return cls(core, bundles, np.array(macs), spills, blocks, loops)

  @property
  def pace(self) -> float:
    """Of the peak, in the main loop; 0 if nothing is multiplied.

    That is the fastest of the large blocks that lie in a loop, those with half
    of the products of the largest.  Each product counts as one of full rows,
    which some are not: never more than 1.
    """
    inside = [
      b for b in self.blocks if any(l <= b[0] < h for l, h in self.loops)
    ]
    work = {b: self.macs[slice(*b)].sum() for b in inside or self.blocks}
    most = max(work.values(), default=0)
    large = [b for b, macs in work.items() if most and 2 * macs >= most]
    fastest = max((work[b] / (b[1] - b[0]) for b in large), default=0)
    return min(float(fastest / self.core.macs), 1.0)


def target(instruction: str) -> int:
  """The bundle that a branch goes to."""
  return int(must_find(r"target bundleno = (\d+)", instruction)[1])


def must_find(pattern: str, text: str) -> re.Match[str]:
  """What must be there."""
  match = re.search(pattern, text)
  if match is None:
    raise ValueError(f"not a schedule as we know them: no {pattern} in {text}")
  return match


def _bundles(text: str) -> Iterator[str]:
  """The text of each bundle, without comments that mean nothing."""
  text = re.sub(r"/\* (core) id \*/|/\* (kRem) \*/", r", \1\2", text)
  text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
  head = r"^ *(?:0x[0-9a-f]+|0) (?:[A-Z]{2})? *:[> ]*\{"
  for body in re.split(head, text, flags=re.M)[1:]:
    yield body.rpartition("}")[0]


def _rows(instruction: str) -> int:
  """Rows that go into a matrix unit: two to a word of bf16."""
  match = re.search(r"= vmatmul\S*", instruction)
  return 0 if not match else 16 if "bf16" in match[0] else 8
