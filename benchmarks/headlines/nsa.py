# SPDX-License-Identifier: Apache-2.0
"""NSA: needles learnt with a quarter of the blocks."""

from adaptivejax.methods.attention import NSA
from benchmarks.headlines import Headline, lessons

PAPER = (
  "trained with sparse attention, a model of 27B is as good as with full"
  " attention or better, and finds every needle in 64k tokens (unverified)"
)
SIZES = {"size": 8, "stride": 4, "window": 32}


def measure(quick: bool) -> Headline:
  def look(rngs):
    return NSA(
      lessons.FEATURES, lessons.HEADS, block=lessons.BLOCK,
      blocks=lessons.BLOCKS, rngs=rngs, **SIZES,
    )  # fmt: skip

  return lessons.measure("nsa", look, quick)
