# SPDX-License-Identifier: Apache-2.0
"""EViT on photographs: the most attended tokens and one for the rest."""

import functools

from adaptivejax.methods.tokens import token_pruning
from benchmarks.headlines import Headline, photos

PAPER = "DeiT-S 50 % faster for 0.3 % accuracy, trained with it"
AT = (3, 6, 9)


def measure(quick: bool) -> Headline:
  prune = lambda keep, fuse: functools.partial(
    token_pruning, keep=keep, at=AT, fuse=fuse
  )
  stacks = {f"keep {keep}": prune(keep, True) for keep in (0.7, 0.5)}
  stacks["keep 0.7, rest gone"] = prune(0.7, False)
  found = photos.compare(stacks, quick)
  text = f"ViT-S/14, {photos.tokens(quick)} tokens, untrained: " + "; ".join(
    f"{name}: {photos.said(one)}" for name, one in found.items()
  )
  best = found["keep 0.7"]
  holds = best.speed >= 1.4 and best.first >= 0.98
  return Headline(text, photos.figures(found), holds)
