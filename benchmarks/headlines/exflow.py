# SPDX-License-Identifier: Apache-2.0
"""ExFlow: hops between devices by placement, a byte language model that routes.

The affinity is of text of the training files, the hops are of held-out files;
each of 2, 4 or 8 devices holds as many experts of every layer.  Chance is the
same search on a trace whose bytes were shuffled, layer by layer: what it finds
is in the loads, not in the affinity.
"""

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.methods.experts import (
  apply_placement,
  expert_affinity,
  in_order,
  mean_hops,
  place_experts,
)
from benchmarks.headlines import Headline
from benchmarks.headlines.beds import texts
from benchmarks.headlines.routed import EXPERTS, routed_lm, trace_of

PAPER = (
  "Placing experts by affinity cuts up to 67 % of tokens' cross-GPU routing"
  " latency, outputs unchanged"
)
WINDOWS = 200


def measure(quick: bool) -> Headline:
  model = routed_lm(quick)
  count = 8 if quick else WINDOWS
  seen = trace_of(model, texts(count, split="train"))
  held = trace_of(model, texts(count))
  shuffled = np.random.default_rng(0).permuted(seen, axis=0)
  layers, figures, cuts = seen.shape[1], {}, {}
  for devices in (2, 4, 8):
    plain = mean_hops(held, in_order(layers, EXPERTS, devices))
    by = {
      "placed": place_experts(expert_affinity(seen, EXPERTS), devices),
      "chance": place_experts(expert_affinity(shuffled, EXPERTS), devices),
    }
    figures[f"hops_{devices}"] = plain
    for name, place in by.items():
      figures[f"hops_{devices}_{name}"] = mean_hops(held, place)
    cuts[devices] = 1 - figures[f"hops_{devices}_placed"] / plain
    if devices == 4:
      figures["logits_differ_by"] = _differ(model, by["placed"], texts(4))
  parts = "; ".join(
    f"{g} devices: {figures[f'hops_{g}']:.2f} in order,"
    f" {figures[f'hops_{g}_chance']:.2f} placed by a shuffled trace,"
    f" {figures[f'hops_{g}_placed']:.2f} by affinity (-{cut:.0%})"
    for g, cut in cuts.items()
  )
  text = (
    f"device changes of a byte on its way through {layers} layers of {EXPERTS}"
    f" experts, {parts}; logits differ by {figures['logits_differ_by']:g}."
    " Hops are counted, no GPU is timed"
  )
  exact = figures["logits_differ_by"] == 0
  return Headline(text, figures, exact and max(cuts.values()) >= 0.4)


def _differ(model, place, text) -> float:
  read = jax.jit(lambda model: model(text).logits)
  moved = read(apply_placement(model, place))
  return float(jnp.abs(moved - read(model)).max())
