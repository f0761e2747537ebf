# SPDX-License-Identifier: Apache-2.0
"""FFN-SkipLLM: feed-forward layers left out, against whole layers left out.

Thresholds are chosen on training files to skip a given share, and measured on
held-out ones.  Whole layers, as many of them, are left out by the plan that is
best on the training files, among all that keep the first and the last layer.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from adaptivejax.core.losses import accuracy
from adaptivejax.methods.depth import ffn_skip
from adaptivejax.nn import by_plan
from benchmarks.headlines import Headline, beds

PAPER = (
  "25-30 % of feed-forward layers are skipped with marginal change in"
  " performance, where skipping whole layers hurts at 10-15 %"
)
LEVELS = (*np.arange(0.6, 0.94, 0.02), *np.arange(0.94, 1.0005, 0.0025))
SHARES = (1 / 6, 1 / 4, 1 / 3)
LAYERS = beds.MODEL.layers


def measure(quick: bool) -> Headline:
  seen = beds.texts(20 if quick else 100, split="train")
  held, figures = beds.texts(20 if quick else 600), {}
  for kind in ("exits", "dense"):
    model = beds.byte_lm(kind, quick)
    figures[f"{kind}_full"] = full = float(_skipping(model, held, 2.0)[0])
    levels = [(float(_skipping(model, seen, x)[1]), x) for x in LEVELS]
    for share in SHARES:
      # The share that comes nearest to the one that is asked for.
      level = min(levels, key=lambda pair: abs(pair[0] - share))[1]
      right, skipped = map(float, _skipping(model, held, level))
      figures[f"{kind}_skipped_{share:.0%}"] = skipped
      figures[f"{kind}_drop_{share:.0%}"] = full - right
    for count in (1, 2):
      plans = [
        ~np.isin(np.arange(LAYERS), gone)
        for gone in itertools.combinations(range(1, LAYERS - 1), count)
      ]
      plans = [np.stack([keep, keep], axis=1) for keep in plans]
      best = max(plans, key=lambda plan: float(_planned(model, seen, plan)))
      lost = full - float(_planned(model, held, best))
      figures[f"{kind}_drop_layers_{count / LAYERS:.0%}"] = lost
  drop = lambda kind, name: 100 * figures[f"{kind}_drop_{name}"]
  words = "; ".join(
    f"{kind}: "
    + ", ".join(
      f"{drop(kind, f'{share:.0%}'):.1f} points at"
      f" {figures[f'{kind}_skipped_{share:.0%}']:.0%}"
      for share in SHARES
    )
    + f" (whole layers {drop(kind, 'layers_17%'):.1f} at 17%,"
    f" {drop(kind, 'layers_33%'):.1f} at 33%)"
    for kind in ("exits", "dense")
  )
  words = (
    f"accuracy lost by skipping feed-forward layers, model trained {words}"
  )
  marginal = figures["exits_drop_25%"] <= 0.015
  relative = all(
    drop(kind, f"{share:.0%}") < drop(kind, f"layers_{share:.0%}")
    for kind in ("exits", "dense")
    for share in (1 / 6, 1 / 3)
  )
  return Headline(words, figures, marginal and relative)


@jax.jit
def _skipping(model, text, threshold):
  """`(accuracy, share of feed-forward layers skipped)`."""
  stack = Partial(ffn_skip, threshold=threshold)
  out = model(text[:, :-1], stack=stack)
  skipped = 2 * (LAYERS - out.depth.mean()) / LAYERS
  return accuracy(out.logits, text[:, 1:]), skipped


@jax.jit
def _planned(model, text, plan):
  out = model(text[:, :-1], stack=Partial(by_plan, plan=jnp.asarray(plan)))
  return accuracy(out.logits, text[:, 1:])
