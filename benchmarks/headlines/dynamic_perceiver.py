# SPDX-License-Identifier: Apache-2.0
"""Dynamic Perceiver, its budgets: early exits of digits under a budget q."""

import functools

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from adaptivejax.core import exit_fractions, logit_margin, solve_exit_thresholds
from adaptivejax.methods.depth.dynamic_perceiver import (
  budgeted_exit,
  perceiver_loss,
)
from benchmarks.headlines import Headline
from benchmarks.headlines.classifiers import (
  CONFIG,
  STEPS,
  answer,
  build,
  correct,
  data,
  every_exit,
  fit,
)

PAPER = (
  "exits on a branch of their own make backbones significantly more efficient"
  " at equal accuracy, over a wide range of budgets (abstract)"
)
K = CONFIG.layers


def measure(quick: bool) -> Headline:
  weights = (0.25,) * (K - 1) + (0.5,)
  loss = lambda model, batch, key: perceiver_loss(
    model.every_exit(batch.inputs, key).logits, batch.labels, weights
  )
  parts = data()
  model = fit(build(), loss, parts.train, steps=4 if quick else STEPS)
  test = parts.test
  full = correct(every_exit(model, test.inputs).logits[-1], test.labels)
  figures = {"full accuracy": full}
  rule = functools.partial(budgeted_exit, confidence=logit_margin)
  seen = every_exit(model, parts.calibration.inputs).logits
  margins = np.asarray(logit_margin(seen)).T
  for q in (0.3, 0.5, 1.0):
    wished = exit_fractions(q, K)
    levels = jnp.asarray(solve_exit_thresholds(margins, wished))
    out = answer(model, test.inputs, Partial(rule, thresholds=levels))
    figures[f"accuracy q={q}"] = correct(out.logits, test.labels)
    figures[f"depth q={q}"] = float(out.exit.mean())
    figures[f"compute q={q}"] = float(out.cost.share)
  less = K / figures["depth q=0.3"]
  lost = full - figures["accuracy q=0.3"]
  text = (
    f"digits, {K} exits, q=0.3: {less:.1f}x fewer layers"
    f" ({figures['depth q=0.3']:.2f} of {K}, {figures['compute q=0.3']:.0%} of"
    f" the FLOPs), accuracy {figures['accuracy q=0.3']:.1%} against {full:.1%}"
    " in full"
  )
  return Headline(text, figures, less >= 3 and lost <= 0.005)
