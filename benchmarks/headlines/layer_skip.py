# SPDX-License-Identifier: Apache-2.0
"""LayerSkip: the accuracy after every layer, against plain training.

Models of one size and one number of steps: one trained with layers dropped and
a loss after every layer, one on the last loss only, and one on all losses but
without dropping (sorted fine-tuning).
"""

from benchmarks.headlines import Headline, beds

PAPER = (
  "Layer dropout and one shared exit loss make earlier layers exact enough to"
  " exit at, the last layer about as good as before (unverified)"
)


def measure(quick: bool) -> Headline:
  text, half = beds.texts(20 if quick else 600), beds.MODEL.layers // 2
  found = {
    kind: [float(a) for a in beds.layer_accuracy(model, text)]
    for kind in ("layer_skip", "dense", "exits")
    for model in [beds.byte_lm(kind, quick)]
  }
  ours, dense, exits = found.values()
  gain, price = ours[half - 1] - dense[half - 1], dense[-1] - ours[-1]
  figures = {
    f"{kind}_{n}": value
    for kind, values in found.items()
    for n, value in enumerate(values, 1)
  }
  figures |= {"gain": gain, "price": price}
  words = (
    f"accuracy after half the layers {ours[half - 1]:.3f} against"
    f" {dense[half - 1]:.3f} ({100 * gain:+.1f} points), after the first"
    f" {ours[0]:.3f} against {dense[0]:.3f}; all layers pay"
    f" {100 * price:.1f} points. With the losses of every layer but nothing"
    f" dropped: {exits[half - 1]:.3f} after half, {exits[-1]:.3f} after all"
  )
  return Headline(words, figures, gain >= 0.08 and price <= 0.015)
