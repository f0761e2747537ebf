# SPDX-License-Identifier: Apache-2.0
"""NSA: needles learnt with a quarter of the blocks."""

from adaptivejax.methods.attention import NSA
from benchmarks.headlines import Headline, needles

PAPER = (
  "trained with sparse attention, a model of 27B is as good as with full"
  " attention or better, and finds every needle in 64k tokens (unverified)"
)
SIZES = {"size": 8, "stride": 4, "window": 32}


def measure(quick: bool) -> Headline:
  def look(rngs):
    return NSA(
      needles.FEATURES, needles.HEADS, block=needles.BLOCK,
      blocks=needles.BLOCKS, rngs=rngs, **SIZES,
    )  # fmt: skip

  return needles.measure("nsa", look, quick)
