# SPDX-License-Identifier: Apache-2.0
"""DeeR-VLA's criterion where the action is a vector of ten numbers.

The target is the one-hot vector of the digit, learnt by regression; an action
succeeds if its largest number is the digit.  No robot, and no history.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from adaptivejax.core import exit_fractions
from adaptivejax.methods.depth.deer_vla import (
  Control,
  action_exit,
  solve_action_thresholds,
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
  "5.2-6.5x less LLM compute and 2-6x less LLM memory on CALVIN at the same"
  " success (abstract)"
)
K, C = CONFIG.layers, CONFIG.classes


def loss(model, batch, key):
  """Squared error of every exit."""
  target = jax.nn.one_hot(batch.labels, C)
  return ((model.every_exit(batch.inputs, key).logits - target) ** 2).mean()


def measure(quick: bool) -> Headline:
  parts = data()
  model = fit(build(), loss, parts.train, steps=4 if quick else STEPS)
  test = parts.test
  full = correct(every_exit(model, test.inputs).logits[-1], test.labels)
  actions = every_exit(model, parts.calibration.inputs).logits
  figures = {"full success": full}
  start = Control.start(len(test.inputs), C)
  for q in (0.3, 0.5, 1.0):
    wished = exit_fractions(q, K)
    wished[0] = 0
    levels = solve_action_thresholds(actions, wished / wished.sum())
    rule = Partial(action_exit, thresholds=jnp.asarray(levels), max_layer=K)
    out = answer(model, test.inputs, rule, start)
    figures[f"success q={q}"] = correct(out.logits, test.labels)
    figures[f"depth q={q}"] = float(out.exit.mean())
    figures[f"compute q={q}"] = float(out.cost.share)
  never = jnp.full(K, -1.0)
  for layers in (2, 3):
    rule = Partial(action_exit, thresholds=never, max_layer=layers)
    out = answer(model, test.inputs, rule, start)
    figures[f"success max_layer={layers}"] = correct(out.logits, test.labels)
  less = 1 / figures["compute q=0.3"]
  lost = full - figures["success q=0.3"]
  text = (
    f"ten-number actions from digits, {K} exits, q=0.3: {less:.1f}x less"
    f" compute (depth {figures['depth q=0.3']:.2f}), success"
    f" {figures['success q=0.3']:.1%} against {full:.1%} in full; the first"
    " exit has nothing to compare with, so that 3x is the most there is"
  )
  return Headline(text, figures, less >= 2 and lost <= 0.005)
