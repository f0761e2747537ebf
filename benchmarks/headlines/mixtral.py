# SPDX-License-Identifier: Apache-2.0
"""Mixtral: eight experts, two of them for each byte, against one dense layer.

Both spend the same FLOPs on a byte, but for the router, and have seen the same
text; the experts have nearly four times the feed-forward parameters.
"""

import math

import jax
import numpy as np

from adaptivejax.core.losses import cross_entropy
from adaptivejax.nn import adjust
from benchmarks.headlines import Headline
from benchmarks.headlines.beds import EXPERTS, byte_lm, texts

PAPER = (
  "With 13B active parameters, 2 experts of 8, it outperforms or matches the"
  " dense Llama 2 70B (unverified)"
)


def measure(quick: bool) -> Headline:
  text = texts(20 if quick else 400)
  dense, routed = byte_lm("dense", quick), byte_lm("experts", quick)
  base, found = _read(dense, text), _read(routed, text)
  fewer = _read(adjust(routed, 1.0), text)
  bits = lambda out: float(out["nats"].mean()) / math.log(2)
  gain = np.asarray(base["nats"] - found["nats"]) / math.log(2)
  load = np.asarray(found["load"][0])
  figures = {
    "bits": bits(found),
    "dense_bits": bits(base),
    "bits_of_one_expert": bits(fewer),
    "gain": float(gain.mean()),
    "standard_error": float(gain.std() / math.sqrt(len(gain))),
    "flops": float(found["spent"] / base["spent"]),
    "imbalance": float((load.max(1) / load.mean(1)).mean()),
    "parameters": _size(routed) / _size(dense),
  }
  words = (
    f"{figures['bits']:.3f} bits per byte against {figures['dense_bits']:.3f}"
    f" (gain {figures['gain']:.3f} ± {figures['standard_error']:.3f}) at"
    f" {figures['flops']:.0%} of the dense model's FLOPs and"
    f" {figures['parameters']:.1f} times its parameters, after as many steps;"
    f" served with one expert {figures['bits_of_one_expert']:.3f}. The fullest"
    f" of {EXPERTS} experts has {figures['imbalance']:.2f} times the mean load."
    " Against equal FLOPs, not against a larger model"
  )
  return Headline(words, figures, figures["gain"] > 0)


@jax.jit
def _read(model, text):
  out = model(text[:, :-1])
  return {
    "nats": cross_entropy(out.logits, text[:, 1:]).mean(1),  # of each window
    "load": out.signals.load,
    "spent": out.cost.spent,
  }


def _size(model) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(model))
