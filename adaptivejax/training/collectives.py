# SPDX-License-Identifier: Apache-2.0
"""What a compiled program sends between devices, read from its HLO."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}
LINE = re.compile(rf"= (?P<shape>.+?) (?P<kind>{'|'.join(KINDS)})(-start)?\(")
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
  """Exchanges of one kind over the same mesh axes.

  Attributes:
    kind: such as `all-gather`.
    axes: mesh axes, joined by +; `?` where no axes make up the groups.
    count: in a run; those in a loop whose rounds are not known count once.
    sites: in the text of the program.
    bytes: that one device gets by all of them.
  """

  kind: str
  axes: str
  count: int
  sites: int
  bytes: int


def collectives(hlo: str, mesh: Mapping[str, int]) -> list[Collective]:
  """All of a program for the devices of a mesh, the largest first."""
  groups = _groups_by_axes(mesh)
  count: Counter[tuple[str, str]] = Counter()
  sites, size = Counter(count), Counter(count)
  for rounds, line in _lines(hlo):
    if found := LINE.search(line):
      key = found["kind"], _axes(line, groups, mesh)
      count[key] += rounds
      sites[key] += 1
      size[key] += rounds * _bytes(found["shape"], start="-start(" in line)
  made = [Collective(*key, count[key], sites[key], size[key]) for key in count]
  return sorted(made, key=lambda c: -c.bytes)


def _lines(hlo: str) -> Iterator[tuple[int, str]]:
  """Every instruction, and how often it runs: the rounds of loops around it."""
  bodies: dict[str, list[str]] = {}
  entry = name = ""
  for line in hlo.splitlines():
    if found := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
      name = found[2]
      bodies[name] = []
      entry = name if found[1] else entry
    elif name:
      bodies[name].append(line)
  rounds: Counter[str] = Counter({entry: 1})
  waiting = [entry]
  while waiting:
    name = waiting.pop()
    for line in bodies.get(name, ()):
      known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
      times = rounds[name] * (int(known[1]) if known else 1)
      for called in _called(line):
        if called in bodies and called not in rounds:
          rounds[called] = times
          waiting.append(called)
  for name, lines in bodies.items():
    yield from ((max(rounds[name], 1), line) for line in lines)


def _called(line: str) -> list[str]:
  """Computations that an instruction runs."""
  many = re.findall(r"branch_computations=\{([^}]*)\}", line)
  one = re.findall(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)"
    r"=%?([\w.\-]+)",
    line,
  )
  listed = [name for names in many for name in names.split(",")]
  return one + [name.strip().lstrip("%") for name in listed]


def conditionals(hlo: str) -> int:
  """Branches that are still branches, and loops."""
  return len(re.findall(r"= .+? (?:conditional|while)\(", hlo))


def kernels(hlo: str) -> Counter[str]:
  """Custom calls of kernels by name."""
  found = re.findall(
    r'custom_call_target="(tpu_custom_call|mosaic_gpu[^"]*)"', hlo
  )
  return Counter(found)


def _bytes(shape: str, *, start: bool) -> int:
  """Of the result; a `start` has operands and results in a tuple."""
  sizes = []
  for kind, dims in ARRAY.findall(shape):
    bits = BITS.get(kind) or int(re.sub(r"\D", "", kind) or 32)
    elements = math.prod(int(n) for n in dims.split(",") if n)
    sizes.append(elements * bits // 8)
  if start and len(sizes) > 1:
    return max(sizes)
  return sum(sizes)


def _groups_by_axes(mesh: Mapping[str, int]) -> dict[frozenset, str]:
  """The groups of devices that differ along some axes only, by these."""
  names = [name for name, size in mesh.items() if size > 1]
  ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
  order = list(mesh)
  found = {}
  for bits in range(1, 2 ** len(names)):
    axes = [name for n, name in enumerate(names) if bits >> n & 1]
    places = [order.index(name) for name in axes]
    last = np.moveaxis(ids, places, range(-len(places), 0))
    width = math.prod(mesh[name] for name in axes)
    rows = last.reshape(-1, width)
    found[frozenset(frozenset(row) for row in rows.tolist())] = "+".join(axes)
  return found


def _axes(line: str, groups: Mapping[frozenset, str], mesh) -> str:
  devices = math.prod(mesh.values())
  if found := re.search(r"source_target_pairs=\{([^=]*?)\}\}", line):
    pairs = np.asarray(re.findall(r"\d+", found[1]), int).reshape(-1, 2)
    return _axes_of_pairs(pairs, mesh)
  listed = _listed(line, devices)
  return (
    groups.get(listed, "?")
    if listed
    else "+".join(name for name, size in mesh.items() if size > 1)
  )


def _listed(line: str, devices: int) -> frozenset | None:
  """Its groups of devices; None for all in one."""
  if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
    groups = re.findall(r"\{([\d,]+)\}", found[1])
    rows = [[int(n) for n in group.split(",")] for group in groups]
    return frozenset(frozenset(row) for row in rows)
  pattern = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
  if found := re.search(pattern, line):
    shape, whole = ([int(n) for n in found[i].split(",")] for i in (1, 2))
    ids = np.arange(math.prod(whole)).reshape(whole)
    if found[3]:
      ids = ids.transpose([int(n) for n in found[3].split(",")])
    return frozenset(frozenset(row) for row in ids.reshape(shape).tolist())
  pattern = r"replica_groups=mesh\[([^\]]+)\](?:\((.*?)\))? \{([^}]*)\}"
  if found := re.search(pattern, line):
    return _of_named_mesh(found, devices)
  return None


def _of_named_mesh(found: re.Match[str], devices: int) -> frozenset:
  """`mesh['axis_0'=8,'axis_1'=1] {'axis_0'}`, as newer XLA writes it."""
  sizes = {n: int(s) for n, s in re.findall(r"'(\w+)'=(\d+)", found[1])}
  names = re.findall(r"'(\w+)'", found[3])
  ids = np.arange(devices).reshape(tuple(sizes.values()))
  places = [list(sizes).index(name) for name in names]
  last = np.moveaxis(ids, places, range(-len(places), 0))
  width = math.prod(sizes[name] for name in names)
  return frozenset(frozenset(r) for r in last.reshape(-1, width).tolist())


def _axes_of_pairs(pairs: np.ndarray, mesh: Mapping[str, int]) -> str:
  """The axes along which sources and targets differ."""
  shape = tuple(mesh.values())
  a, b = (np.stack(np.unravel_index(p, shape)) for p in pairs.T)
  differ = (a != b).any(1)
  return "+".join(n for n, d in zip(mesh, differ) if d) or "?"
