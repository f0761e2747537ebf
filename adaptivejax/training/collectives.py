# SPDX-License-Identifier: Apache-2.0
"""What a compiled program sends between devices, read from its HLO."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from adaptivejax.training.hlo import Module, Op
from adaptivejax.training.hlo_cost import walk

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)


class Collective(NamedTuple):
  """Exchanges of one kind over the same mesh axes.

  Attributes:
    kind: such as `all-gather`.
    axes: mesh axes, joined by +; `?` where no axes make up the groups.
    count: in a run, as `hlo_cost` counts rounds and branches.
    sites: in the text of the program.
    bytes: that one device gets by all of them.
    largest: shape of the largest result.
  """

  kind: str
  axes: str
  count: int
  sites: int
  bytes: int
  largest: str


def collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
  """All of a program for the devices of a mesh, the largest first."""
  groups = _groups_by_axes(mesh)
  count: dict[tuple[str, str], float] = defaultdict(float)
  sites: Counter[tuple[str, str]] = Counter()
  size, widest = defaultdict(float), {}
  for visit in walk(module):
    op = visit.op
    kind = op.kind.removesuffix("-start")
    if kind not in KINDS:
      continue
    key = kind, _axes(op.attributes, groups, mesh)
    count[key] += visit.times
    sites[key] += 1
    size[key] += visit.times * _bytes(op)
    array = max(op.arrays, key=lambda a: a.bytes)
    if key not in widest or array.bytes > widest[key].bytes:
      widest[key] = array
  made = [
    Collective(
      *key, round(count[key]), sites[key], round(size[key]), str(widest[key])
    )
    for key in count
  ]
  return sorted(made, key=lambda c: -c.bytes)


def branches(module: Module) -> tuple[int, int]:
  """Conditionals, and loops, in the text of a program."""
  kinds = Counter(op.kind for op in module.ops())
  return kinds["conditional"], kinds["while"]


def _bytes(op: Op) -> int:
  """Of the result; a `start` has operands and results in a tuple."""
  sizes = [array.bytes for array in op.arrays]
  if op.kind.endswith("-start") and len(sizes) > 1:
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
