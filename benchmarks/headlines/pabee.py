# SPDX-License-Identifier: Apache-2.0
"""PABEE on digits: patience against the full model and a fixed depth."""

import jax.numpy as jnp
from jax.tree_util import Partial

from adaptivejax.core import Streak
from adaptivejax.methods.depth.pabee import pabee_loss, patient_exit
from benchmarks.headlines import Headline
from benchmarks.headlines.classifiers import (
  CONFIG,
  STEPS,
  answer,
  build,
  correct,
  data,
  every_exit,
  exit_losses,
  fit,
)

PAPER = (
  "fewer layers than the full model at a higher accuracy, as later layers"
  " overthink (GLUE; unverified)"
)
K, NOISE = CONFIG.layers, 0.3


def loss(model, batch, key):
  return pabee_loss(exit_losses(model, batch, key)[0])


def measure(quick: bool) -> Headline:
  parts = data(NOISE)
  model = fit(build(), loss, parts.train, steps=4 if quick else STEPS)
  test = parts.test
  every = every_exit(model, test.inputs).logits
  fixed = [correct(z, test.labels) for z in every]
  figures = {f"accuracy exit {k}": a for k, a in enumerate(fixed, 1)}
  start = Streak.none(len(test.inputs))
  for limit in (1, 2, 3):
    rule = Partial(patient_exit, limit=jnp.int32(limit))
    out = answer(model, test.inputs, rule, start)
    figures[f"accuracy t={limit}"] = correct(out.logits, test.labels)
    figures[f"depth t={limit}"] = float(out.exit.mean())
    figures[f"compute t={limit}"] = float(out.cost.share)
  faster = 1 / figures["compute t=2"]
  text = (
    f"noisy digits, {K} exits, patience 2: {faster:.2f}x less compute (depth"
    f" {figures['depth t=2']:.2f}), accuracy {figures['accuracy t=2']:.1%}"
    f" against {fixed[-1]:.1%} in full and {fixed[2]:.1%} at exit 3"
  )
  holds = faster >= 1.5 and figures["accuracy t=2"] >= fixed[-1]
  return Headline(text, figures, holds)
