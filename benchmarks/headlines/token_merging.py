# SPDX-License-Identifier: Apache-2.0
"""ToMe on photographs: a fixed number of merges, and merges above a cosine."""

import functools

import jax.numpy as jnp
from jax.tree_util import Partial

from adaptivejax.methods.tokens import similar_merging, token_merging
from benchmarks.headlines import Headline, photos

PAPER = (
  "2x the throughput of ViT-L at 512 px and ViT-H at 518 px for 0.2-0.3 %"
  " accuracy, without training"
)
LAYERS, LATE = 12, 4


def measure(quick: bool) -> Headline:
  n = photos.tokens(quick)
  stacks = {
    f"r={r}": functools.partial(token_merging, merges=r)
    for r in (round(0.04 * n), round(0.075 * n))
  }
  late = jnp.arange(LAYERS) >= LATE
  stacks |= {
    f"cosine>{level}": Partial(similar_merging, threshold=level, at=late)
    for level in (0.95, 0.9)
  }
  found = photos.compare(stacks, quick)
  names = list(found)
  text = f"ViT-S/14, {n} tokens, untrained: " + "; ".join(
    f"{name}: {photos.said(found[name])}" for name in names
  )
  holds = any(f.speed >= 1.9 and f.patches >= 0.95 for f in found.values())
  return Headline(text, photos.figures(found), holds)
