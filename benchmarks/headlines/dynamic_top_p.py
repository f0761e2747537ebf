# SPDX-License-Identifier: Apache-2.0
"""Dynamic top-p: experts that bytes run by the router's mass, against top-2.

Whether hard bytes run more experts is the rank correlation, over held-out
bytes, of a byte's loss with the experts that it runs in all layers.
"""

from scipy.stats import spearmanr

from adaptivejax.methods.experts import TopPRouter
from benchmarks.headlines import Headline, beds
from benchmarks.headlines.mixtures import (
  EXPERTS,
  FEATURES,
  byte_lm,
  mixture,
  read,
  top_two,
)

PAPER = (
  "0.7 % better than top-2 on average with less than 90 % of the activated"
  " parameters; harder tasks get more experts"
)


def measure(quick: bool) -> Headline:
  text = beds.texts(20 if quick else 400)
  router = lambda rngs: TopPRouter(FEATURES, EXPERTS, rngs=rngs)
  model = byte_lm("dynamic_top_p", mixture(router), quick)
  ours, fixed = read(model, text), read(top_two(quick), text)
  gain, error = ours.gain(fixed)
  each = ours.choices.mean(0)
  per_layer = ours.choices.mean((1, 2))
  hard = float(spearmanr(ours.nats.ravel(), each.ravel()).statistic)
  figures = {
    "bits": ours.bits,
    "top_two_bits": fixed.bits,
    "gain": gain,
    "standard_error": error,
    "experts": float(each.mean()),
    "fewest": float(per_layer.min()),
    "most": float(per_layer.max()),
    "flops": ours.spent / fixed.spent,
    "hard_bytes": hard,
  }
  words = (
    f"{figures['experts']:.2f} experts per byte ({figures['fewest']:.2f} to"
    f" {figures['most']:.2f} by layer), {figures['flops']:.0%} of the FLOPs of"
    f" top-2, at {figures['bits']:.3f} bits per byte against"
    f" {figures['top_two_bits']:.3f} (gain {gain:.3f} ± {error:.3f}), after as"
    " many steps; rank correlation of a byte's loss with its experts"
    f" {hard:+.2f}: hard bytes get {'more' if hard > 0 else 'fewer'}"
  )
  cheaper = figures["experts"] < 1.8
  return Headline(words, figures, gain > -error and cheaper and hard > 0)
