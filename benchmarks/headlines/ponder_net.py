# SPDX-License-Identifier: Apache-2.0
"""PALBERT's Q-exit against PonderNet's drawn exit, on noisy digits."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from adaptivejax.methods.depth.ponder_net import (
  Lambda,
  Pondering,
  exit_probabilities,
  geometric_prior,
  ponder_loss,
  q_exit,
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
  "a drawn exit has a major variance that costs performance; the deterministic"
  " Q-exit does better (PALBERT, abstract)"
)
K, D, NOISE, DRAWS = CONFIG.layers, CONFIG.features, 0.3, 20
RATE, BETA = 0.3, 0.3


def loss(both, batch, key):
  model, head = both
  nats, out = exit_losses(model, batch, key)
  p = exit_probabilities(head, out.pooled)
  return ponder_loss(nats, p, geometric_prior(RATE, K), BETA)


def measure(quick: bool) -> Headline:
  parts = data(NOISE)
  both = build(), Lambda(D, rngs=nnx.Rngs(1))
  model, head = fit(both, loss, parts.train, steps=4 if quick else STEPS)
  inputs, labels = parts.test
  rows = len(inputs)
  start = Pondering.start(rows, D)

  def leave(q):
    out = answer(model, inputs, Partial(q_exit, head=head, q=q), start)
    return correct(out.logits, labels), np.asarray(out.exit)

  sure, exits = leave(jnp.full(rows, 0.5))
  keys = jax.random.split(jax.random.key(0), 2 if quick else DRAWS)
  draws = [leave(jax.random.uniform(key, (rows,))) for key in keys]
  drawn, table = np.mean([a for a, _ in draws]), np.array([e for _, e in draws])
  full = correct(every_exit(model, inputs).logits[-1], labels)
  figures = {
    "full accuracy": full,
    "accuracy q=0.5": sure,
    "accuracy drawn": float(drawn),
    "depth q=0.5": float(exits.mean()),
    "depth drawn": float(table.mean()),
    "variance of exits q=0.5": float(exits.var()),
    "variance of exits drawn": float(table.var()),
    "of one input, drawn": float(table.var(0).mean()),
  }
  text = (
    f"noisy digits, {K} exits: Q-exit {sure:.1%} at depth {exits.mean():.2f},"
    f" exits drawn from the same p {drawn:.1%} at {table.mean():.2f} (full"
    f" {full:.1%}); variance of the exit {exits.var():.2f} against"
    f" {table.var():.2f}"
  )
  return Headline(
    text, figures, bool(sure >= drawn and exits.var() < table.var())
  )
