# SPDX-License-Identifier: Apache-2.0
"""What goes wrong quietly in adaptive training, seen in the metrics.

A model can learn on while its decisions die: a router sends all to the same
experts, an expert gets nothing and so learns nothing, all tokens leave at one
exit, the compute misses its budget.  Each rule below looks at the lines of
metrics.jsonl, means over `log_every` steps; it speaks once it has held for
`PATIENCE` lines in a row, and again when it no longer holds.

    router collapse   collapse >= 0.9: 0 is even, at 1 all items go to the same
                      experts (`tasks.balance_metrics`)
    dead experts      dead >= 0.05 of the experts got under 1 % of the mean load
    exit collapse     the share of compute stands still within 0.0001 after it
                      had moved by 0.01, or is within 0.01 of 1 and not 1: what
                      all tokens do alike varies with no text.  At the lowest
                      it has been all leave first, at the highest all last.
                      Not where it follows a budget
    budget miss       the share is off its target by more than 0.05

What it remembers is a function of the lines so far, so it is the same in a run
that was stopped.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

PATIENCE = 3
COLLAPSED = 0.9
DEAD = 0.05
STILL, MOVED, FULL = 1e-4, 1e-2, 0.99
MISSED = 0.05

UNLEARNED = {"step", "split", "seconds", "tokens_per_second", "skipped"}
"""What a line says whose steps were all skipped."""

Line = Mapping[str, Any]


class Watch:
  """Looks at lines of metrics, in order, beginning with those there are."""

  def __init__(self, lines: Iterable[Line] = ()):
    self.shares: list[float] = []
    self.held: dict[str, int] = {}  # lines in a row, of each rule that holds
    for line in lines:
      self.see(line)

  def see(self, line: Line) -> list[tuple[str, str]]:
    """`(event, text)` for what begins or ends with this line."""
    if line["split"] != "train" or set(line) <= UNLEARNED:
      return []
    found = dict(self._found(line))
    said = [
      (event, f"{event} is over")
      for event, count in self.held.items()
      if event not in found and count >= PATIENCE
    ]
    self.held = {event: self.held.get(event, 0) + 1 for event in found}
    return said + [
      (event, text)
      for event, text in found.items()
      if self.held[event] == PATIENCE
    ]

  def _found(self, line: Line) -> Iterable[tuple[str, str]]:
    """What this line shows."""
    collapse, dead = line.get("collapse", 0), line.get("dead", 0)
    if collapse >= COLLAPSED:
      yield (
        "router collapse",
        f"router collapse: nearly all items of a layer go to the same experts"
        f" (collapse {collapse:.2f}); raise the router's balance or z loss, or"
        " lower optimizer.learning_rate",
      )
    if dead >= DEAD:
      yield (
        "dead experts",
        f"dead experts: {dead:.0%} of them get next to no items and learn"
        " nothing; raise the router's balance loss or optimizer.balance_rate,"
        " or take fewer experts",
      )
    share = line.get("share")
    if share is None:
      return
    self.shares.append(share)
    told = abs(share - line.get("budget", math.inf)) <= MOVED
    if (where := self._stands(share)) and not told:
      yield (
        "exit collapse",
        f"exit collapse: all tokens leave {where} (share of compute"
        f" {share:.3f}); change the weight of the ponder, budget or balance"
        " loss",
      )
    budget = line.get("budget", share)
    if abs(share - budget) > MISSED:
      yield (
        "budget miss",
        f"budget miss: the share of compute is {share:.2f} and its target"
        f" {budget:.2f}; raise the weight of the budget loss, or let the"
        " schedule come down more slowly",
      )

  def _stands(self, share: float) -> str | None:
    """At which end all tokens leave, None if they do not."""
    low, high = min(self.shares), max(self.shares)
    if FULL <= share < 1:
      return "last"
    before = self.shares[-2:][0]
    if high - low < MOVED or abs(share - before) > STILL:
      return None
    if share - low < MOVED / 2:
      return "first"
    return "last" if high - share < MOVED / 2 else None
