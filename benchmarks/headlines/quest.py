# SPDX-License-Identifier: Apache-2.0
"""Quest: needles found in the few pages whose bounds are highest.

Beside it the same number of pages by their mean key (`Kinetics`): what the
bounds are for.
"""

from benchmarks.headlines import Headline, needles
from benchmarks.long_context import block_top_k, quest

PAPER = (
  "passkeys in 10k tokens are found at 99 % with 64 tokens read of each head,"
  " where methods that evict find almost none (unverified)"
)
NEAR = 0.9
"""Share of the accuracy with all keys that counts as kept."""


def measure(quick: bool) -> Headline:
  figures = needles.found("quest", quest, quick)
  means = needles.found("means", block_top_k, quick)
  figures = {**means, **figures}
  words = "; ".join(
    f"{budget} of {needles.LENGTH} tokens read:"
    f" {figures[f'quest_{budget}']:.2f} by bounds,"
    f" {figures[f'means_{budget}']:.2f} by mean keys"
    for budget in needles.BUDGETS
  )
  words = f"needles found, {figures['all']:.2f} with all keys; {words}"
  kept = figures["quest_256"] >= NEAR * figures["all"]
  better = figures["quest_64"] > figures["means_64"]
  return Headline(words, figures, kept and better)
