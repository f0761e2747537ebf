# SPDX-License-Identifier: Apache-2.0
"""ACT on parity: do longer inputs ponder longer?

An input is eight tokens, the first n of them bits, -1 or 1, the others 0; the
label is the parity of the ones.  All n from 1 to 8 are equally likely.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import stats

from adaptivejax.core import cross_entropy
from adaptivejax.methods.depth import AdaptiveComputationTime
from adaptivejax.models import Classifier, ClassifierConfig, encoder_block
from benchmarks.headlines import Headline
from benchmarks.headlines.classifiers import fit

PAPER = (
  "on parity the steps a network takes grow with the difficulty of the input,"
  " the number of its bits (unverified)"
)
TOKENS, MOST, COST = 8, 8, 3e-3
CONFIG = ClassifierConfig(
  tokens=TOKENS, inputs=1, classes=2, layers=1, features=32, hidden=128
)


def bits(count: int, seed: int = 0):
  """`(inputs f32[N, 8, 1], labels i32[N], n i32[N])`."""
  rng = np.random.default_rng(seed)
  n = rng.integers(1, TOKENS + 1, count)
  ones = rng.choice([-1.0, 1.0], (count, TOKENS))
  ones = np.where(np.arange(TOKENS) < n[:, None], ones, 0)
  labels = (ones > 0).sum(1) % 2
  inputs = jnp.asarray(ones[..., None], jnp.float32)
  return inputs, jnp.asarray(labels, jnp.int32), n


def loss(model, batch, key):
  out = model.every_exit(batch[0], key)
  return (
    cross_entropy(out.logits[-1], batch[1]).mean() + COST * out.signals.penalty
  )


@jax.jit
def pondered(model, inputs):
  """`(logits, steps of each token, cost)`, stopping with the last token."""
  x = model.embed(inputs)
  layer = jax.tree.map(lambda a: a[0], model.layers)
  _, steps, _, cost = layer.ponder(x, jnp.zeros(x.shape[:2], jnp.int32))
  return model(inputs).logits, steps, cost


def measure(quick: bool) -> Headline:
  make = lambda rngs: AdaptiveComputationTime(
    encoder_block(CONFIG, rngs), CONFIG.features, steps=MOST, rngs=rngs
  )
  model = Classifier(CONFIG, layer=make, rngs=nnx.Rngs(0))
  inputs, labels, _ = bits(20_000)
  model = fit(model, loss, (inputs, labels), steps=4 if quick else 3000)
  inputs, labels, n = bits(800, seed=1)
  logits, steps, cost = pondered(model, inputs)
  right = np.asarray(logits.argmax(-1) == labels)
  mean = np.asarray(steps).mean(1)
  by = [mean[n == k].mean() for k in range(1, TOKENS + 1)]
  rank = stats.spearmanr(n, mean).statistic if np.ptp(mean) > 0 else 0.0
  figures = {f"steps n={k}": float(s) for k, s in enumerate(by, 1)}
  figures |= {
    "accuracy": float(right.mean()),
    "compute": float(cost.share),
    "rank correlation of n and steps": float(rank),
  }
  text = (
    f"parity of 1 to {TOKENS} bits, up to {MOST} steps: {by[0]:.2f} steps for"
    f" one bit, {by[3]:.2f} for four, {by[-1]:.2f} for eight (rank correlation"
    f" {rank:.2f}), accuracy {right.mean():.1%}, {float(cost.share):.0%} of the"
    " FLOPs"
  )
  return Headline(text, figures, bool(rank > 0.3 and right.mean() > 0.9))
