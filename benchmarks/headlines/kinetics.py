# SPDX-License-Identifier: Apache-2.0
"""Kinetics: how much longer a text sparse attention affords at the same cost.

By its law of cost, for a model of the size of Qwen3-0.6B; and what block top-k
by mean keys finds of needles, beside the bounds of Quest.
"""

import numpy as np

from adaptivejax.methods.attention import kinetics_cost
from benchmarks.headlines import Headline, needles
from benchmarks.long_context import block_top_k

PAPER = (
  "sparse attention scales better than dense at every cost: more than 60 points"
  " at low cost and 5 at high cost on AIME, at 1024 tokens read (unverified)"
)
PARAMETERS, LAYERS, HEADS, KV_HEADS, WIDTH = 6e8, 28, 16, 8, 128
CONTEXT, TRIALS, BUDGET = 512, 8, 1024
DENSE = 1024, 4096, 16384
"""Lengths generated densely."""


def measure(quick: bool) -> Headline:
  figures = {}
  for length in DENSE:
    cost = _eflops(length)
    figures[f"cheaper_{length}"] = cost / _eflops(length, BUDGET)
    figures[f"longer_{length}"] = _length(cost) / length
  figures |= needles.found("means", block_top_k, quick)
  times = lambda name: ", ".join(
    f"{figures[f'{name}_{length}']:.1f}" for length in DENSE
  )
  words = (
    f"by the cost law, {TRIALS} texts of {', '.join(map(str, DENSE))} tokens"
    f" cost {times('cheaper')} times as much densely as with {BUDGET} tokens"
    f" read, and at the same cost are {times('longer')} times as long; needles"
    f" found, {figures['all']:.2f} with all keys,"
    f" {figures['means_64']:.2f} with 64, {figures['means_256']:.2f} with 256"
    f" of {needles.LENGTH} tokens: a mean key hides one token among 15 others"
  )
  scales = np.diff([figures[f"cheaper_{length}"] for length in DENSE]) > 0
  kept = figures["means_256"] >= 0.9 * figures["all"]
  return Headline(words, figures, bool(scales.all() and kept))


def _eflops(length: int, budget: int | None = None) -> float:
  return kinetics_cost(
    PARAMETERS,
    LAYERS * HEADS,
    LAYERS * KV_HEADS,
    WIDTH,
    CONTEXT,
    length,
    TRIALS,
    budget=budget,
  ).eflops


def _length(cost: float) -> int:
  """The longest text that costs as much with sparse attention."""
  low, high = 1, 1 << 24
  while high - low > 1:
    middle = (low + high) // 2
    fits = _eflops(middle, BUDGET) <= cost
    low, high = (middle, high) if fits else (low, middle)
  return low
