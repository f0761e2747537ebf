# SPDX-License-Identifier: Apache-2.0
"""ATS on photographs: as many tokens as the class token looks at."""

import jax.numpy as jnp
from jax.tree_util import Partial

from adaptivejax.methods.tokens import adaptive_token_sampling
from benchmarks.headlines import Headline, photos

PAPER = "half the FLOPs at the accuracy of DeiT-S"
LAYERS, FIRST = 12, 3


def measure(quick: bool) -> Headline:
  n, at = photos.tokens(quick), jnp.arange(LAYERS) >= FIRST
  stacks = {
    f"K={k}": Partial(adaptive_token_sampling, samples=float(k), at=at)
    for k in (n, n // 2)
  }
  found = photos.compare(stacks, quick)
  text = f"ViT-S/14, {n} tokens, untrained, from layer 4 on: " + "; ".join(
    f"{name}: {photos.said(one)}" for name, one in found.items()
  )
  holds = any(f.share <= 0.55 and f.first >= 0.98 for f in found.values())
  return Headline(text, photos.figures(found), holds)
