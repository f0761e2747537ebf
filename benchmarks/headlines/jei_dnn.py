# SPDX-License-Identifier: Apache-2.0
"""JEI-DNN against thresholds on a frozen backbone, on noisy digits.

Both train the exits of the same backbone, from the same start, as long and at
the same rate: JEI-DNN with its gates, the baseline all alike.  The baseline's
threshold, on the largest probability, spends the mean depth that the gates
spend on the calibration part.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from adaptivejax.core import (
  cross_entropy,
  exit_depth,
  max_prob,
  solve_depth_threshold,
)
from adaptivejax.methods.depth.jei_dnn import (
  Gates,
  exit_loss,
  exit_probabilities,
  gate_labels,
  gate_loss,
  gated_exit,
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
  exit_losses,
  fit,
)

PAPER = (
  "gates and exits trained together beat thresholds on confidence, in accuracy"
  " at equal cost and in the calibration of what is answered (abstract)"
)
K, NOISE, TRADEOFFS = CONFIG.layers, 0.3, (0.3, 1.0, 3.0)
RATE = 1e-2


def losses(exits, batch):
  """`(cross-entropy [K, N], logits)` of exits on known pooled states."""
  pooled, labels = jnp.swapaxes(batch[0], 0, 1), batch[1]
  logits = jax.vmap(_say)(exits, pooled)
  return jax.vmap(cross_entropy, (0, None))(logits, labels), logits


def alike(exits, batch, key):
  del key
  return losses(exits, batch)[0].mean()


def joint(tradeoff, both, batch, key):
  """Exits and gates at once: neither's loss has a slope for the other."""
  del key
  exits, gates = both
  nats, logits = losses(exits, batch)
  scores = gates.every(logits)
  labels = gate_labels(nats, jnp.arange(1, K + 1) / K, tradeoff)
  leave = gate_loss(scores, labels)
  return exit_loss(nats, exit_probabilities(scores)) + leave


def calibration_error(logits, labels, bins=15) -> float:
  """Mean gap of confidence and accuracy over bins of confidence."""
  sure, right = np.asarray(max_prob(logits)), logits.argmax(-1) == labels
  place = np.minimum((sure * bins).astype(int), bins - 1)
  gaps = [abs((sure - right)[place == b].sum()) for b in range(bins)]
  return float(sum(gaps) / len(sure))


def measure(quick: bool) -> Headline:
  parts, steps = data(NOISE), 4 if quick else STEPS
  last = lambda m, batch, key: exit_losses(m, batch, key)[0][-1].mean()
  model = fit(build(), last, parts.train, steps=steps)
  seen = [every_exit(model, part.inputs).pooled for part in parts]
  known = jnp.swapaxes(seen[0], 0, 1), parts.train.labels
  warm = fit(model.exits, alike, known, steps=steps)
  plain = fit(warm, alike, known, steps=steps, rate=RATE)
  inputs, labels = parts.test
  said = [jax.vmap(_say)(plain, pooled) for pooled in seen[1:]]
  table = [np.asarray(max_prob(logits)).T for logits in said]
  figures, wins = {}, [0, 0]
  for tradeoff in TRADEOFFS:
    loss = functools.partial(joint, tradeoff)
    exits, gates = fit((warm, Gates(K)), loss, known, steps=steps, rate=RATE)
    ours = jax.tree.map(lambda a: a, model)  # a copy
    ours.exits = exits
    rule = Partial(gated_exit, gates=gates)
    known_inputs = parts.calibration.inputs
    spent = answer(ours, known_inputs, rule, jnp.ones(len(known_inputs)))
    out = answer(ours, inputs, rule, jnp.ones(len(labels)))
    level = solve_depth_threshold(table[0], float(spent.exit.mean()))
    taken = exit_depth(table[1], level)
    logits = said[1][taken - 1, np.arange(len(labels))]
    gated = _score(figures, "gates", tradeoff, out.logits, out.exit, labels)
    held = _score(figures, "threshold", tradeoff, logits, taken, labels)
    wins[0] += gated[0] >= held[0]
    wins[1] += gated[1] < held[1]
  sides = [
    f"{name} {figures[f'accuracy {name} 1.0']:.1%} (error of calibration"
    f" {figures[f'calibration error {name} 1.0']:.3f}, depth"
    f" {figures[f'depth {name} 1.0']:.2f})"
    for name in ("gates", "threshold")
  ]
  rounds = len(TRADEOFFS)
  text = (
    f"noisy digits, frozen backbone, {K} exits: {' against '.join(sides)} at"
    f" lambda 1; gates as accurate at {wins[0]} of {rounds} budgets, better"
    f" calibrated at {wins[1]}"
  )
  return Headline(text, figures, wins == [rounds, rounds])


def _say(exit, pooled):
  return exit(pooled)


def _score(figures, name, tradeoff, logits, depth, labels):
  """`(accuracy, calibration error)`, also put into `figures`."""
  scores = correct(logits, labels), calibration_error(logits, labels)
  figures[f"accuracy {name} {tradeoff}"] = scores[0]
  figures[f"calibration error {name} {tradeoff}"] = scores[1]
  figures[f"depth {name} {tradeoff}"] = float(np.mean(depth))
  return scores
