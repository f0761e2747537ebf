# SPDX-License-Identifier: Apache-2.0
"""What a report says, as plain data: no figure is computed while rendering.

A measured number may be None (or NaN, which is stored as None): "not measured".
Text of a model is `bytes`, for a byte-level model need not write UTF-8.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeGuard

Number = int | float | None
Facts = dict[str, str | int | float]
REGIMES = ("decode", "long decode", "prompt", "long prompt", "score")


def real(x: Number) -> TypeGuard[float]:
  """Whether `x` was measured and is finite."""
  return x is not None and math.isfinite(x)


@dataclasses.dataclass(frozen=True)
class Point:
  """One method at one setting (a budget): its quality, speed and compute.

  `speedup` is its tokens per second over those of its dense twin, measured in
  the same run; `spread` holds the quartiles of that ratio.  `flops_share` is
  the realised share of the twin's FLOPs.  `dense` marks the twin itself.
  `perplexity` is that of a token, where tokens are not bytes.
  """

  method: str
  setting: str
  regime: str  # one of REGIMES
  bits_per_byte: Number
  tokens_per_second: Number
  speedup: Number
  spread: tuple[Number, Number]
  flops_share: Number
  mean_depth: Number = None
  dense: bool = False
  perplexity: Number = None

  def __post_init__(self):
    if self.regime not in REGIMES:
      raise ValueError(
        f"Point.regime={self.regime!r} must be one of {REGIMES}: generation"
        " token by token, the same after a long prompt, reading a prompt, or"
        " scoring of whole sequences"
      )

  @property
  def slower(self) -> bool:
    """Whether it lost to the dense twin on the clock."""
    return not self.dense and real(self.speedup) and self.speedup < 1


@dataclasses.dataclass(frozen=True)
class Curve:
  """Training of one model; None where a step has no such figure.

  `imbalance` is the load of the fullest expert over the mean; empty for a model
  without experts.
  """

  name: str
  steps: tuple[int, ...]
  loss: tuple[Number, ...]
  val_bits_per_byte: tuple[Number, ...]
  seconds: tuple[Number, ...]
  imbalance: tuple[Number, ...] = ()

  def __post_init__(self):
    optional = ("imbalance",) if self.imbalance else ()
    for field in ("loss", "val_bits_per_byte", "seconds", *optional):
      if len(getattr(self, field)) != len(self.steps):
        raise ValueError(
          f"Curve {self.name!r}: `{field}` has {len(getattr(self, field))}"
          f" entries for {len(self.steps)} steps; give None for those missing"
        )


@dataclasses.dataclass(frozen=True)
class Snippet:
  """Where the compute went over one text.

  `share[t]` in 0..1 is the share of the dense compute that token t got;
  `matrix[l][t]` that of layer l.  `lengths[t]` is the number of bytes of token
  t; left out, every byte is a token.  `whole` says what the shares are of, if
  not of the dense compute.
  """

  text: bytes
  share: tuple[float, ...]
  matrix: tuple[tuple[float, ...], ...]
  method: str
  setting: str
  lengths: tuple[int, ...] | None = None
  whole: str = "the dense compute"

  def __post_init__(self):
    tokens = len(self.text if self.lengths is None else self.lengths)
    widths = {len(self.share), *map(len, self.matrix)}
    short = min(self.token_lengths, default=0) < 0
    if short or widths != {tokens} or sum(self.token_lengths) != len(self.text):
      raise ValueError(
        f"Snippet {self.method!r}: {len(self.text)} bytes in {tokens} tokens"
        f" need `share` and each row of `matrix` to have {tokens} entries and"
        f" `lengths` to sum to the bytes; got rows of {sorted(widths)}"
      )

  @property
  def token_lengths(self) -> Sequence[int]:
    """Bytes of each token."""
    return (1,) * len(self.text) if self.lengths is None else self.lengths


@dataclasses.dataclass(frozen=True)
class Mixture:
  """How a model used its experts while reading a text.

  `load[l][e]` is the share of the choices in layer l that expert e got, and
  `dropped` the share of all choices that found no room.  The tokens, sorted by
  how hard they were to predict, are cut into bins of equal size: `nats[i]` and
  `experts[i]` are the means of bin i, the experts being those that a token ran
  in one layer.
  """

  method: str
  setting: str
  load: tuple[tuple[float, ...], ...]
  dropped: Number
  nats: tuple[float, ...]
  experts: tuple[float, ...]

  def __post_init__(self):
    if not self.load or not all(self.load):
      raise ValueError(f"Mixture {self.method!r}: `load` holds no expert")
    if len(self.nats) != len(self.experts):
      raise ValueError(
        f"Mixture {self.method!r}: {len(self.nats)} bins of `nats`, but"
        f" {len(self.experts)} of `experts`"
      )

  def imbalance(self, layer: int) -> float:
    """The load of the fullest expert over the mean; 0 without any load."""
    load = self.load[layer]
    return max(load) * len(load) / (sum(load) or 1)

  @property
  def mean_imbalance(self) -> float:
    """The mean over the layers."""
    layers = range(len(self.load))
    return sum(map(self.imbalance, layers)) / len(layers)


@dataclasses.dataclass(frozen=True)
class BudgetCurve:
  """What a method reaches with each budget: `values[i]` with `budgets[i]`.

  A budget is keys that a query may see; `measure` names what is measured, and
  methods of one measure share a plot.
  """

  method: str
  measure: str
  budgets: tuple[float, ...]
  values: tuple[Number, ...]

  def __post_init__(self):
    if len(self.budgets) != len(self.values):
      raise ValueError(
        f"BudgetCurve {self.method!r}: {len(self.values)} values for"
        f" {len(self.budgets)} budgets; give None for those missing"
      )


@dataclasses.dataclass(frozen=True)
class Sample:
  """Text that a model wrote."""

  prompt: bytes
  continuation: bytes
  method: str
  setting: str
  tokens_per_second: Number
  mean_depth: Number = None


@dataclasses.dataclass(frozen=True)
class Grid:
  """A table of what has no plot: words in rows, under heads."""

  title: str
  heads: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]
  caption: str = ""

  def __post_init__(self):
    if not self.heads or any(len(r) != len(self.heads) for r in self.rows):
      raise ValueError(
        f"Grid {self.title!r}: each row needs {len(self.heads)} cells, one for"
        " each head"
      )


@dataclasses.dataclass(frozen=True)
class Report:
  """All of a report.

  `command` makes it again; `measured` says how, `notes` what to be wary of, a
  paragraph an entry.
  """

  title: str
  command: str
  environment: Facts
  points: tuple[Point, ...] = ()
  curves: tuple[Curve, ...] = ()
  mixtures: tuple[Mixture, ...] = ()
  snippets: tuple[Snippet, ...] = ()
  samples: tuple[Sample, ...] = ()
  budgets: tuple[BudgetCurve, ...] = ()
  grids: tuple[Grid, ...] = ()
  measured: tuple[str, ...] = ()
  notes: tuple[str, ...] = ()

  def dense(self, regime: str) -> Point | None:
    """The dense twin in a regime."""
    twins = [p for p in self.points if p.dense and p.regime == regime]
    return twins[0] if twins else None

  def regimes(self) -> list[str]:
    """The regimes that have points."""
    return [r for r in REGIMES if any(p.regime == r for p in self.points)]

  def loss_of_quality(self, point: Point) -> Number:
    """Bits per byte relative to the dense twin: 0.01 is 1 % worse."""
    return self._more(point, "bits_per_byte")

  def rise(self, point: Point) -> Number:
    """Perplexity relative to the dense twin: 0.03 is 3 % more."""
    return self._more(point, "perplexity")

  def _more(self, point: Point, name: str) -> Number:
    """How much larger a figure is than that of the dense twin, as a share."""
    own, twin = getattr(point, name), self.dense(point.regime)
    base = None if twin is None else getattr(twin, name)
    return own / base - 1 if real(own) and real(base) and base else None

  def best(self, regime: str, tolerance: float = 0.01) -> Point | None:
    """The fastest adaptive point at most `tolerance` worse than dense."""
    near = [
      (p.speedup, p)
      for p in self.points
      if p.regime == regime and not p.dense and real(p.speedup)
      if (loss := self.loss_of_quality(p)) is not None and loss <= tolerance
    ]
    return max(near, key=lambda pair: pair[0])[1] if near else None

  def slower(self) -> list[Point]:
    """The points that lost to dense on the clock."""
    return [p for p in self.points if p.slower]
