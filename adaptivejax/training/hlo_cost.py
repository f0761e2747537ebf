# SPDX-License-Identifier: Apache-2.0
"""What a compiled program computes and moves, each loop with all its rounds.

XLA's own `cost_analysis` counts the body of a loop once, so that of 32 scanned
layers it sees one.  Here products count 2 m n k, convolutions as XLA counts
them (the TPU compiler writes a product as one), kernels what they declare.

Of a conditional the branch with most products counts; where one runs a kernel
and one does not, the kernel's, which is the usual one (`core.expert_kernel`).
A loop whose rounds are data counts the most there can be, and its share is kept
apart, as is that of kernels over what was chosen: there a budget acts.  Loops
over the rows that were chosen (`core.chunks`, `core.groups`) say how many rows
there are; of those of several chunk sizes the largest counts, for all rows.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from adaptivejax.training.hlo import Array, Computation, Module, Op, arrays

FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while",
  "conditional", "call", "after-all", "iota", "partition-id", "replica-id",
  "opt-barrier", "domain",
}  # fmt: skip
"""Instructions that move nothing, or whose insides are counted."""

KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu)')


class Visit(NamedTuple):
  """An instruction, and how often it runs.

  Attributes:
    op: itself.
    around: the computation that it is in.
    times: in a run of the program; 0 in a branch that is not the dearest.
    by_data: a loop around it is as long as data say, at most as said.
    fused: it is part of a larger one, which moves its data.
  """

  op: Op
  around: Computation
  times: float
  by_data: bool
  fused: bool


class Work(NamedTuple):
  """What a program does, on one device.

  Attributes:
    flops: whatever the data are.
    data_flops: in loops whose rounds are data, at most.
    bytes: of memory, read and written; `data_bytes` likewise.
    unknown: loops of which nothing is known; they count one round.
  """

  flops: float
  data_flops: float
  bytes: float
  data_bytes: float
  unknown: int

  def at(self, share: float) -> tuple[float, float]:
    """`(flops, bytes)` where data ask for this share of the most."""
    return (
      self.flops + share * self.data_flops,
      self.bytes + share * self.data_bytes,
    )


def work(module: Module) -> Work:
  """Of one run of the program."""
  flops, moved, unknown = [0.0, 0.0], [0.0, 0.0], 0
  for visit in walk(module):
    op, some = visit.op, visit.by_data
    some |= op.kind == "custom-call" and "asked" in op.marks
    flops[some] += visit.times * op_flops(op, visit.around)
    if not visit.fused and visit.times:
      moved[some] += visit.times * op_bytes(module, op, visit.around)
    if op.kind == "while" and visit.times:
      unknown += not _rounds(module, op, visit.around)[2]
  return Work(flops[0], flops[1], moved[0], moved[1], unknown)


def is_kernel(op: Op) -> bool:
  """Whether an instruction calls a kernel."""
  return bool(KERNEL.search(op.attributes))


def walk(module: Module) -> Iterator[Visit]:
  """Every instruction that runs, from the entry on."""
  dear: dict[str, tuple[bool, float]] = {}

  def price(name: str) -> tuple[bool, float]:
    """Whether a computation runs a kernel, and its FLOPs, at most."""
    if name not in dear:
      runs = [v for v in go(name, 1, False, False) if v.times]
      flops = sum(v.times * op_flops(v.op, v.around) for v in runs)
      dear[name] = any(is_kernel(v.op) for v in runs), flops
    return dear[name]

  def go(name, times, by_data, fused):
    around = module.computations[name]
    for op in around.values():
      yield Visit(op, around, times, by_data, fused)
      if op.kind == "while":
        rounds, sure, known = _rounds(module, op, around)
        moves = by_data or (known and not sure)
        for inner in op.calls("body", "condition"):
          yield from go(inner, times * rounds, moves, fused)
      elif op.kind == "conditional":
        names = [*op.calls("false_computation"), *op.calls("true_computation")]
        names += op.calls("branch_computations")
        best = max(names, key=price)
        moves = by_data or "of" in op.marks
        for inner in names:
          yield from go(inner, times * (inner == best), moves, fused)
      elif op.kind == "fusion":
        for inner in op.calls("calls"):
          yield from go(inner, times, by_data, True)
      elif op.kind in ("call", "async-start"):
        for inner in op.calls("calls", "to_apply"):
          yield from go(inner, times, by_data, fused)

  yield from go(module.entry, 1, False, False)


def _rounds(module: Module, op: Op, around) -> tuple[float, bool, bool]:
  """`(rounds at most, whether they are sure, whether anything is known)`."""
  marks = op.marks
  if "once" in marks and "of" not in marks:
    return marks["once"], True, True
  if marks.get("of") and "rows" in marks:
    rows = marks.get("asked", marks["rows"])
    return (0.0 if marks["rows"] == 0 else rows / marks["of"]), False, True
  return tuple(module.rounds(op, around))


def op_flops(op: Op, around: Computation) -> float:
  """Of one instruction alone."""
  if op.kind == "dot":
    (left, *_), dims = _given(op, around), _listed(op, "lhs_contracting_dims")
    depth = math.prod(left.dims[d] for d in dims)
    return 2.0 * math.prod(op.arrays[0].dims) * depth
  if op.kind == "convolution":
    return _convolution(op, around)
  if op.kind == "custom-call":
    return _declared(op, around)
  return 0.0


def _declared(op: Op, around: Computation) -> float:
  """Of a call of a kernel, or of a library's product."""
  if found := re.search(r'"?flops"?:\s*"?(\d+)', op.attributes):
    marks, flops = op.marks, float(found[1])
    if marks.get("rows") and "asked" in marks:  # it declares them for all rows
      flops *= marks["asked"] / marks["rows"]
    return flops
  pattern = r'lhs_contracting_dimensions":\["(\d+)"'
  if found := re.search(pattern, op.attributes):
    left = _given(op, around)[0]
    return 2.0 * math.prod(op.arrays[0].dims) * left.dims[int(found[1])]
  return 0.0


def _convolution(op: Op, around: Computation) -> float:
  """As `HloCostAnalysis` counts it: what falls outside is not computed."""
  left, right = _given(op, around)[:2]
  out = op.arrays[0]
  found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
  if found is None:
    return 0.0
  lhs, rhs, res = found.groups()
  window = _window(op)
  valid = 1.0
  for i in range(sum(c.isdigit() for c in lhs)):
    letter = str(i)
    valid *= _positions(
      left.dims[lhs.index(letter)],
      right.dims[rhs.index(letter)],
      out.dims[res.index(letter)],
      {name: values[i] for name, values in window.items()},
    )
  groups = _number(op, "feature_group_count")
  batches = _number(op, "batch_group_count")
  depth = left.dims[lhs.index("f")] / groups
  features = right.dims[rhs.index("o")]
  return 2.0 * depth * features * left.dims[lhs.index("b")] / batches * valid


def _positions(size: int, kernel: int, out: int, window) -> int:
  """Pairs of a place of the kernel and of the output that meet the input."""
  stride, dilate = window.get("stride", 1), window.get("lhs_dilate", 1)
  spread, pad = window.get("rhs_dilate", 1), window.get("pad", 0)
  at = np.arange(out)[:, None] * stride - pad + np.arange(kernel) * spread
  return int(((at % dilate == 0) & (at >= 0) & (at // dilate < size)).sum())


def _window(op: Op) -> dict[str, list[int]]:
  """Settings of a convolution by axis; of the padding what comes before."""
  found = re.search(r"window=\{([^}]*)\}", op.attributes)
  window = {}
  for name, values in re.findall(r"(\w+)=(\S+)", found[1] if found else ""):
    parts = values.split("x")
    window[name] = [int(part.split("_")[0]) for part in parts]
  return window


def op_bytes(module: Module, op: Op, around: Computation) -> float:
  """Of large memory, read and written by one instruction."""
  if op.kind in FREE or op.kind.endswith(("-done", "-update")):
    return 0.0
  given = [around[name] for name in op.operands if name in around]
  out = _hbm(op)
  if op.kind in ("dynamic-slice", "gather", "slice"):
    return 2.0 * out
  if op.kind == "dynamic-update-slice":
    return 2.0 * _hbm(given[1])
  if op.kind in ("copy-start", "slice-start"):  # of one memory into the other
    sides = [a for a in op.arrays if a.dims]
    least = min((a.bytes for a in sides), default=0)
    return 1.0 * least * sum(a.in_hbm for a in sides)
  if op.kind == "scatter":
    return 3.0 * _hbm(given[-1])
  if op.kind == "fusion":
    return _fusion(module, op, given)
  return out + sum(map(_hbm, given))


def _fusion(module: Module, op: Op, given: list[Op]) -> float:
  """Of a parameter that is only sliced, the slices; of a part that is written
  in place, the part.
  """
  (name,) = op.calls("calls")
  inner = module.computations[name]
  users: dict[str, list[Op]] = {}
  for other in inner.values():
    for used in {*other.operands}:
      users.setdefault(used, []).append(other)
  root, total, placed = module.root(name), 0.0, None
  if root.kind == "dynamic-update-slice":
    placed = root.operands[0]
    total += _size(inner[root.operands[1]])
  else:
    total += _hbm(op)
  for parameter in (p for p in inner.values() if p.kind == "parameter"):
    number = int(parameter.inside)
    if number >= len(given) or parameter.name == placed:
      continue
    uses = users.get(parameter.name, [])
    if uses and all(_picks(u, parameter) for u in uses):
      total += sum(map(_size, uses))
    else:
      total += _hbm(given[number])
  return total


def _picks(op: Op, array: Op) -> bool:
  """Whether it takes a part out of an array."""
  takes = op.kind in ("dynamic-slice", "gather", "slice")
  return takes and op.operands[0] == array.name


def largest(module: Module, count: int = 5) -> list[tuple[int, str, str]]:
  """The largest arrays, each shape once: `(bytes, shape, where it is from)`."""
  inside = {n for op in module.ops() for n in op.calls("calls")}
  found: dict[str, tuple[int, str]] = {}
  for name, computation in module.computations.items():
    for op in computation.values() if name not in inside else ():
      if op.kind not in FREE or op.kind == "parameter":
        origin = op.label.rpartition("jit(")[2] or op.name
        for array in op.arrays:
          found.setdefault(str(array), (array.bytes, origin))
  ordered = sorted(found.items(), key=lambda item: -item[1][0])
  return [(size, shape, name) for shape, (size, name) in ordered[:count]]


def _given(op: Op, around: Computation) -> list[Array]:
  """The first array of each operand."""
  written = arrays(op.inside)  # some write their shapes out
  return written or [around[n].arrays[0] for n in op.operands]


def _size(op: Op) -> int:
  return sum(a.bytes for a in op.arrays)


def _hbm(op: Op) -> int:
  return sum(a.bytes for a in op.arrays if a.in_hbm)


def _listed(op: Op, name: str) -> list[int]:
  found = re.search(rf"{name}=\{{([\d,]*)\}}", op.attributes)
  return [int(n) for n in found[1].split(",") if n] if found else []


def _number(op: Op, name: str) -> int:
  found = re.search(rf"{name}=(\d+)", op.attributes)
  return int(found[1]) if found else 1
