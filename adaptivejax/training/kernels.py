# SPDX-License-Identifier: Apache-2.0
"""The kernels in a compiled program."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from adaptivejax.training.hlo import Module, Op
from adaptivejax.training.hlo_cost import Visit, is_kernel, op_flops, walk
from adaptivejax.training.tpu_schedule import Schedule


class Kernel(NamedTuple):
  """The calls of one kernel.

  Attributes:
    name: that it was given.
    sites: in the text of the program.
    count: in a run, as `hlo_cost` counts rounds and branches.
    flops: that it declares, in a run.
    pace: of the peak, in its main loop (`Schedule.pace`); None if no schedule
      was read, or it multiplies nothing.
    spills: vector registers put away, in the text of all its sites; None if no
      schedule was read.
    cycles: to compute `flops` at that pace, shared by all cores of a chip.
      What is around the loop, and what is waited for, comes on top.
  """

  name: str
  sites: int
  count: int
  flops: float
  pace: float | None = None
  spills: int | None = None
  cycles: float | None = None


def kernels(
  module: Module, schedules: Mapping[str, Schedule] | None = None
) -> list[Kernel]:
  """All of a program, the dearest first.

  `schedules` are by instruction; of kernels with the same body the compiler
  makes one.
  """
  calls: dict[str, list[Visit]] = {}
  for visit in walk(module):
    if is_kernel(visit.op):
      path = visit.op.label.removesuffix("/pallas_call")
      name = path.rpartition("/")[2] or visit.op.name
      calls.setdefault(name, []).append(visit)
  known = dict(schedules or {})
  ops = [visit.op for visits in calls.values() for visit in visits]
  made = {_body(op): known[op.name] for op in ops if op.name in known}
  for op in ops:
    if op.name not in known and _body(op) in made:
      known[op.name] = made[_body(op)]
  found = [_kernel(name, calls[name], known) for name in calls]
  return sorted(found, key=lambda kernel: -kernel.flops)


def _body(op: Op) -> str:
  """What a kernel computes, as the compiler was given it."""
  found = re.search(r'"body":\s*"([^"]*)"', op.attributes)
  return found[1] if found else op.name


def _kernel(
  name: str, visits: list[Visit], schedules: Mapping[str, Schedule]
) -> Kernel:
  flops = [v.times * op_flops(v.op, v.around) for v in visits]
  count = round(sum(v.times for v in visits))
  sites = {v.op.name for v in visits}
  plain = Kernel(name, len(sites), count, sum(flops))
  if not sites <= schedules.keys():
    return plain
  made = [schedules[v.op.name] for v in visits]
  spills = int(sum(schedules[site].spills.sum() for site in sites))
  peaks = [f / (2 * s.core.macs * s.core.cores) for f, s in zip(flops, made)]
  if not all(s.pace for s in made):  # it moves, and multiplies nothing
    return plain._replace(spills=spills)
  cycles = sum(peak / s.pace for peak, s in zip(peaks, made))
  pace = sum(peaks) / cycles if cycles else max(s.pace for s in made)
  return plain._replace(pace=pace, spills=spills, cycles=cycles)
