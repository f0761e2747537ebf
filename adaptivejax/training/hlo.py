# SPDX-License-Identifier: Apache-2.0
"""The text of a compiled program: computations, and the rounds of its loops.

XLA writes the same language for every chip (https://openxla.org/xla/shapes, and
`HloModule::ToString`), but says of a loop how often it runs on some only.  The
rest is read here from its condition: a `lax.scan` counts from a constant to a
constant, and a loop that may end early, such as `core.depth_loop`, says how far
it may go at most.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from adaptivejax.core.marks import marks

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
COMMENT = re.compile(r"/\*.*?\*/")
HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
KIND = re.compile(r"\s*([\w\-]+)\(")
CALLS = re.compile(
  r"(body|condition|calls|to_apply|true_computation|false_computation"
  r"|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
HANDS_ON = {"copy", "copy-start", "copy-done", "bitcast", "opt-barrier"}


class Array(NamedTuple):
  """One array of a shape.

  Attributes:
    kind: of its elements, as `bf16`.
    dims: its axes.
    layout: how it lies, and in which memory.
  """

  kind: str
  dims: tuple[int, ...]
  layout: str

  @property
  def bytes(self) -> int:
    bits = BITS.get(self.kind)
    if bits is None:
      found = re.search(r"\d+", self.kind)
      bits = int(found[0]) if found else 32
    return math.prod(self.dims) * bits // 8

  @property
  def in_hbm(self) -> bool:
    """Whether it lies in the large memory; TPUs mark what does not."""
    return "S(" not in self.layout

  def __str__(self) -> str:
    return f"{self.kind}[{','.join(map(str, self.dims))}]"


class Op(NamedTuple):
  """One instruction.

  Attributes:
    name: of its result.
    shape: of it, as written; a tuple is in brackets.
    kind: what it does, such as `fusion`.
    inside: its operands, as written, or the value of a constant.
    attributes: what follows them.
    root: whether it is what its computation returns.
  """

  name: str
  shape: str
  kind: str
  inside: str
  attributes: str
  root: bool

  @property
  def operands(self) -> list[str]:
    """Their names; some write the shapes before them, some a % as well."""
    bare = ARRAY.sub("", COMMENT.sub("", self.inside))
    return re.findall(r"(?:^|[\s,)])%?([\w.\-]+)\s*(?=,|$)", bare)

  @property
  def arrays(self) -> list[Array]:
    """Those of its result."""
    return arrays(self.shape)

  @property
  def label(self) -> str:
    """Where in the Python program it comes from."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""

  @property
  def marks(self) -> dict[str, int]:
    """What `core.marks` says of it."""
    own = self.label
    if self.kind in ("while", "conditional"):
      own = own.rpartition("/body/")[2]  # not those of a loop around
    asked = marks(self.label).get("asked")
    return ({} if asked is None else {"asked": asked}) | marks(own)

  def calls(self, *kinds: str) -> list[str]:
    """Computations that it runs, those it calls so."""
    found = (names for k, names in CALLS.findall(self.attributes) if k in kinds)
    return [n for names in found for n in re.findall(r"[\w.\-]+", names)]


class Rounds(NamedTuple):
  """How often the body of a loop runs.

  Attributes:
    most: times; 1 where nothing is known.
    sure: it is this number, whatever the data.
    known: there is a number at all.
  """

  most: int
  sure: bool
  known: bool = True


Computation = dict[str, Op]


class Module(NamedTuple):
  """A program.

  Attributes:
    entry: the computation that it starts with.
    computations: by name, their instructions by name, in order.
  """

  entry: str
  computations: dict[str, Computation]

  @classmethod
  def parse(cls, text: str) -> "Module":
    """Reads `Compiled.as_text()`."""
    entry, here = "", None
    computations: dict[str, Computation] = {}
    for line in text.splitlines():
      if head := HEAD.match(line):
        here = computations.setdefault(head[2], {})
        entry = head[2] if head[1] else entry
      elif here is not None and (found := LINE.match(line)):
        op = _op(found[2], found[3], bool(found[1]))
        if op is not None:
          here[op.name] = op
    return cls(entry, computations)

  def root(self, name: str) -> Op:
    """What a computation returns."""
    ops = self.computations[name].values()
    return next((op for op in ops if op.root), [*ops][-1])

  def ops(self) -> Iterator[Op]:
    """Every instruction in the text."""
    for computation in self.computations.values():
      yield from computation.values()

  def rounds(self, loop: Op, around: Computation) -> Rounds:
    """Of a `while` in the computation `around`."""
    told = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if told:
      return Rounds(int(told[1]), sure=True)
    (condition,) = loop.calls("condition")
    root = self.root(condition)
    inner = self.computations[condition]
    if root.kind == "fusion":  # its operands are the parameters inside
      (name,) = root.calls("calls")
      given, inner = [inner[n] for n in root.operands], self.computations[name]
      root = self.root(name)
    else:
      given = []
    tests, sure = [root], True
    while tests and tests[0].kind == "and":
      tests = [inner[n] for n in tests[0].operands] + tests[1:]
      sure = False
    bounds = []
    for test in tests:
      sides = [_source(inner[n], inner) for n in test.operands if n in inner]
      sides = [_outside(side, given) for side in sides]
      if test.kind != "compare" or len(sides) != 2:
        continue
      bound = self._bound(test, sides, loop, around)
      bounds += [] if bound is None else [bound]
    if not bounds:
      return Rounds(1, sure=False, known=False)
    return Rounds(max(min(bounds), 0), sure=sure)

  def _bound(self, test: Op, sides: list[Op], loop: Op, around) -> int | None:
    """Rounds until a counter that is counted up passes a constant."""
    way = re.search(r"direction=(\w+)", test.attributes)
    way = way[1] if way else ""
    if way in ("GT", "GE"):
      sides, way = sides[::-1], {"GT": "LT", "GE": "LE"}[way]
    if way not in ("LT", "LE"):
      return None
    counter, limit = sides
    place = _place(counter)
    end = self._constant(limit, loop, around)
    step = None if place is None else self._step(loop, place, around)
    if place is None or end is None or step is None:
      return None
    start = self._start(place, loop, around)
    return -(-(end - (start or 0) + (way == "LE")) // step)

  def _constant(self, op: Op, loop: Op, around: Computation) -> int | None:
    """The value of a constant, also of one that the loop carries along."""
    if op.kind == "constant":
      return int(op.inside) if re.fullmatch(r"-?\d+", op.inside) else None
    place = _place(op)
    if place is None:
      return None
    (body,) = loop.calls("body")
    ops, end = self.computations[body], self.root(body)
    if end.kind != "tuple" or place >= len(end.operands):
      return None
    kept = ops.get(end.operands[place])
    if kept is None or _place(_source(kept, ops)) != place:
      return None
    return self._start(place, loop, around)

  def _start(self, place: int, loop: Op, around: Computation) -> int | None:
    """What a place of the loop's state holds before the first round."""
    state = around.get(loop.operands[0]) if loop.operands else None
    if state is not None:
      state = _source(state, around)
    if state is None or state.kind != "tuple" or place >= len(state.operands):
      return None
    op = around.get(state.operands[place])
    op = None if op is None else _source(op, around)
    if op is None or op.kind != "constant":
      return None
    return int(op.inside) if re.fullmatch(r"-?\d+", op.inside) else None

  def _step(self, loop: Op, place: int, around: Computation) -> int | None:
    """By how much a place of the loop's state is counted up in a round."""
    (body,) = loop.calls("body")
    ops, end = self.computations[body], self.root(body)
    if end.kind != "tuple" or place >= len(end.operands):
      return None
    op, inner = ops.get(end.operands[place]), ops
    given: list[Op] = []
    if op is not None and op.kind == "fusion":
      (name,) = op.calls("calls")
      given, ops = [ops[n] for n in op.operands], self.computations[name]
      op = self.root(name)
    if op is None or op.kind != "add":
      return None
    terms = [_source(ops[n], ops) for n in op.operands if n in ops]
    terms = [_source(_outside(t, given), inner) for t in terms]
    others = [t for t in terms if _place(t) != place]
    if len(terms) != 2 or len(others) != 1:
      return None
    step = self._constant(others[0], loop, around)
    return step if step and step > 0 else None


def arrays(shape: str) -> list[Array]:
  """The arrays of a shape."""
  ints = lambda text: tuple(int(n) for n in text.split(",") if n)
  return [Array(k, ints(d), layout) for k, d, layout in ARRAY.findall(shape)]


def _op(name: str, text: str, root: bool) -> Op | None:
  shape, rest = _first(text)
  kind = KIND.match(rest)
  if kind is None:
    return None
  inside, attributes = _first(rest[kind.end() - 1 :])
  return Op(name, shape, kind[1], inside[1:-1], attributes, root)


def _first(text: str) -> tuple[str, str]:
  """What is in the first brackets, or up to a blank; and the rest."""
  if not text.startswith("("):
    shape, _, rest = text.partition(" ")
    return shape, rest
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return text[: i + 1], text[i + 1 :]
  return text, ""


def _place(op: Op) -> int | None:
  """Which part of a tuple it takes out."""
  found = re.search(r"index=(\d+)", op.attributes)
  return int(found[1]) if op.kind == "get-tuple-element" and found else None


def _source(op: Op, around: Computation) -> Op:
  """What an instruction hands on, where that is all it does."""
  while op.kind in HANDS_ON and op.operands and op.operands[0] in around:
    op = around[op.operands[0]]
  return op


def _outside(op: Op, given: list[Op]) -> Op:
  """What a fusion was given, where `op` is a parameter inside of it."""
  inside = op.kind == "parameter" and given
  return given[int(op.inside)] if inside else op
