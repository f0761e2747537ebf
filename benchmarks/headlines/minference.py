# SPDX-License-Identifier: Apache-2.0
"""MInference: patterns assigned on training text, measured on other text."""

import collections

from adaptivejax.methods.attention import Budgets, MInference, assign
from benchmarks.headlines import Headline, beds, prefill

PAPER = (
  "up to 10x faster pre-filling of 1M tokens on an A100 while maintaining"
  " accuracy"
)
PATTERNS = ("a_shape", "vertical_slash", "block_sparse")
SINCE = 64
BUDGETS = Budgets(
  sinks=1,
  window=24,
  verticals=16,
  first=1,
  slashes=12,
  recent=8,
  blocks=3,
  probe=16,
)


def measure(quick: bool) -> Headline:
  looks = {name: uniform(name) for name in PATTERNS}
  given = beds.texts(4 if quick else 30, prefill.CONTEXT, split="train")
  table = assign(prefill.model(quick), given, uniform("a_shape"), since=SINCE)
  looks["assigned"] = MInference(table, BUDGETS, **prefill.SIZES)
  found = prefill.kept(looks, quick)
  dense, sparse = (prefill.bits(x, quick) for x in (None, looks["assigned"]))
  many = collections.Counter(name for row in table for name in row)
  one = found["assigned"]
  text = (
    f"{one.density:.0%} of pairs keep {one.recall:.1%} of attention,"
    f" {sparse:.3f} bits per byte against {dense:.3f} dense; {one.good:.0%} of"
    " heads keep 95%; heads assigned: "
    + ", ".join(f"{many[name]} {name}" for name in PATTERNS)
    + "; one pattern for all keeps "
    + ", ".join(
      f"{found[name].recall:.1%} at {found[name].density:.0%}"
      for name in PATTERNS
    )
  )
  numbers = {"dense_bits": dense, "bits": sparse}
  holds = sparse <= 1.01 * dense and one.density <= 0.27
  return Headline(text, {**prefill.figures(found), **numbers}, holds)


def uniform(name: str) -> MInference:
  """One pattern for all heads."""
  return MInference((name,) * prefill.HEADS, BUDGETS, **prefill.SIZES)
