# SPDX-License-Identifier: Apache-2.0
"""Soft MoE: digits in noise by four kinds of feed-forward layers.

An image is sixteen tokens, patches of 2 x 2 pixels.  Eight experts, each as
large as the dense layer, run as many rows as it does, one per token: a token
chooses its best expert (Switch, nothing dropped), an expert its best tokens, or
sixteen slots mix all tokens.  With one slot per expert, eight, half.  Quality
is the mean over seeds of the loss on held-out images, in nats.
"""

import functools
import math

import jax
import numpy as np

from adaptivejax.core.losses import cross_entropy
from adaptivejax.methods.experts import (
  ExpertChoiceRouter,
  SoftMoE,
  SwitchRouter,
)
from adaptivejax.models import ClassifierConfig
from adaptivejax.nn import MixtureOfExperts, Mlp, stacked
from benchmarks.headlines import Headline, classifiers

PAPER = (
  "Far better than dense and sparse layers (tokens' and experts' choice);"
  " Soft MoE-Base/16 matches ViT-Huge/14 at 10.5 times lower inference cost"
)
EXPERTS, STEPS, SEEDS, NOISE = 8, 300, 3, 0.5
CONFIG = ClassifierConfig(tokens=16, inputs=4, layers=2, features=32, hidden=64)
WIDTH, HIDDEN = CONFIG.features, CONFIG.hidden
SLOTS = CONFIG.tokens // EXPERTS


def measure(quick: bool) -> Headline:
  steps, seeds = (4, 1) if quick else (STEPS, SEEDS)
  data = classifiers.data(NOISE)
  train, test = _patches(data.train), _patches(data.test)
  figures, each = {}, {}
  for name, mlp in KINDS.items():
    nats, right, spent = [], [], 0.0
    for seed in range(seeds):
      model = classifiers.with_mlp(CONFIG, mlp, seed)
      model = classifiers.fit(model, _loss, train, steps=steps, seed=seed)
      found, hit, spent = _read(model, test)
      nats.append(np.asarray(found))
      right.append(float(hit))
    each[name] = np.stack(nats).mean(0)
    figures |= {
      f"{name}_nats": float(each[name].mean()),
      f"{name}_accuracy": float(np.mean(right)),
      f"{name}_flops": float(spent),
    }
  rivals = [name for name in KINDS if not name.startswith("soft")]
  better = []
  for name in rivals:
    gain = each[name] - each["soft"]
    error = float(gain.std() / math.sqrt(gain.size))
    figures |= {f"over_{name}": float(gain.mean()), f"error_{name}": error}
    better.append(gain.mean() > 2 * error)
  say = lambda name: (
    f"{figures[f'{name}_nats']:.3f} ({figures[f'{name}_accuracy']:.1%} right,"
    f" {figures[f'{name}_flops'] / figures['dense_flops']:.0%} of the FLOPs)"
  )
  over = ", ".join(
    f"{figures[f'over_{name}']:.3f} ± {figures[f'error_{name}']:.3f}"
    for name in rivals
  )
  words = (
    f"held-out loss {say('soft')}, with half the slots {say('soft_half')};"
    f" dense {say('dense')}, tokens choose {say('tokens')}, experts choose"
    f" {say('experts')}; gains over these {over}; {SEEDS} seeds, {STEPS} steps,"
    f" noise {NOISE}"
  )
  return Headline(words, figures, all(better))


def _experts(rngs):
  return stacked(lambda r: Mlp(WIDTH, HIDDEN, rngs=r), EXPERTS, rngs)


def _sparse(router, rngs):
  router = router(WIDTH, EXPERTS, rngs=rngs)
  return MixtureOfExperts(router, _experts(rngs))


def _soft(slots, rngs):
  return SoftMoE(_experts(rngs), WIDTH, slots=slots, rngs=rngs)


KINDS = {
  "dense": lambda rngs: Mlp(WIDTH, HIDDEN, rngs=rngs),
  "tokens": functools.partial(
    _sparse, functools.partial(SwitchRouter, capacity_factor=float(EXPERTS))
  ),
  "experts": functools.partial(
    _sparse, functools.partial(ExpertChoiceRouter, capacity_factor=1.0)
  ),
  "soft": functools.partial(_soft, SLOTS),
  "soft_half": functools.partial(_soft, 1),
}


def _patches(images: classifiers.Set) -> classifiers.Set:
  """[N, 8, 8] pixels as [N, 16, 4]."""
  cut = images.inputs.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3)
  return images._replace(inputs=cut.reshape(-1, CONFIG.tokens, CONFIG.inputs))


def _loss(model, batch, key):
  out = model.every_exit(batch.inputs, key)
  return cross_entropy(out.logits[-1], batch.labels).mean() + (
    out.signals.penalty
  )


@jax.jit
def _read(model, batch):
  """`(nats of each image, share right, FLOPs)` at the last exit."""
  out = model.every_exit(batch.inputs)
  nats = cross_entropy(out.logits[-1], batch.labels)
  right = (out.logits[-1].argmax(-1) == batch.labels).mean()
  return nats, right, out.cost.spent
