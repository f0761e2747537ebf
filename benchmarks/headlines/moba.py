# SPDX-License-Identifier: Apache-2.0
"""MoBA: needles learnt with a quarter of the blocks."""

from adaptivejax.methods.attention import MoBA
from benchmarks.headlines import Headline, lessons

PAPER = (
  "trained with a sparsity of up to 81 %, the language model loss is within"
  " 1e-3 of full attention, and needles are found up to 1 million tokens"
  " (unverified)"
)


def measure(quick: bool) -> Headline:
  look = lambda rngs: MoBA(lessons.BLOCK, lessons.BLOCKS)
  return lessons.measure("moba", look, quick, free=True)
