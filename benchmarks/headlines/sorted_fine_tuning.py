# SPDX-License-Identifier: Apache-2.0
"""Sorted fine-tuning: half of the layers, nearly all of the quality.

Two models of one size and training: one on the losses after every layer, one on
the last only.  Each is read by its first n layers alone (`prefix`).
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from adaptivejax.core.losses import accuracy
from adaptivejax.methods.depth import prefix
from benchmarks.headlines import Headline, beds

PAPER = (
  "models twice as fast as the original, maintaining or exceeding its"
  " performance"
)


def measure(quick: bool) -> Headline:
  text, layers = beds.texts(20 if quick else 600), beds.MODEL.layers
  found = {
    kind: [
      float(_accuracy(beds.byte_lm(kind, quick), text, jnp.int32(n)))
      for n in range(1, layers + 1)
    ]
    for kind in ("exits", "dense")
  }
  half = layers // 2
  gain = found["exits"][half - 1] - found["dense"][half - 1]
  price = found["dense"][-1] - found["exits"][-1]
  kept = found["exits"][half - 1] / found["exits"][-1]
  words = (
    f"accuracy of half the layers {found['exits'][half - 1]:.3f} against"
    f" {found['dense'][half - 1]:.3f} without ({100 * gain:+.1f} points),"
    f" {kept:.1%} of all layers'; all layers pay {100 * price:.1f} points"
  )
  figures = {
    f"{kind}_{n}": value
    for kind, values in found.items()
    for n, value in enumerate(values, 1)
  }
  figures |= {"gain": gain, "price": price, "kept": kept}
  return Headline(words, figures, bool(gain >= 0.08 and price <= 0.01))


@jax.jit
def _accuracy(model, text, depth):
  out = model(text[:, :-1], stack=Partial(prefix, depth=depth))
  return accuracy(out.logits, text[:, 1:])
