# SPDX-License-Identifier: Apache-2.0
"""TokenSelect: needles found among the few tokens that heads vote for.

Beside it Quest, which has to read a page for a token.
"""

from benchmarks.headlines import Headline, needles
from benchmarks.long_context import quest, token_select

PAPER = (
  "with 2,688 tokens read, accuracy on long contexts (InfiniteBench, RULER) is"
  " that of all keys or better, up to 23.8 times as fast in attention"
  " (unverified)"
)
NEAR = 0.95
"""Share of the accuracy with all keys that counts as kept."""


def measure(quick: bool) -> Headline:
  figures = needles.found("tokens", token_select, quick)
  pages = needles.found("pages", quest, quick)
  figures = {**pages, **figures}
  words = "; ".join(
    f"{budget} of {needles.LENGTH} tokens read:"
    f" {figures[f'tokens_{budget}']:.2f}, {figures[f'pages_{budget}']:.2f} by"
    " pages (Quest)"
    for budget in needles.BUDGETS
  )
  words = f"needles found, {figures['all']:.2f} with all keys; {words}"
  kept = figures["tokens_64"] >= NEAR * figures["all"]
  return Headline(words, figures, kept)
