# SPDX-License-Identifier: Apache-2.0
"""Unified layer skipping: layers left out evenly, or from the end.

Both keep as many layers for every token and are compared as they come, on a
plainly trained model, and after as many steps of training without the layers
that they leave out.  Held-out text is read as if decoding it: the first bytes
run all layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from adaptivejax.core import specialize
from adaptivejax.core.losses import accuracy, cross_entropy
from adaptivejax.methods.depth import kept_layers, unified_skip
from benchmarks.headlines import Headline, beds

PAPER = (
  "At a given speed-up better than dynamic skipping and than dropping"
  " contiguous layers, at the same cost for every token"
)
LAYERS, PROMPT = beds.MODEL.layers, 16
SPEEDUPS, STEPS, BATCH = (1.5, 2.0), 300, 24


def measure(quick: bool) -> Headline:
  dense = beds.byte_lm("dense", quick)
  held, given = (
    beds.texts(20 if quick else 400),
    beds.texts(BATCH if quick else 4000, split="train"),
  )
  full, _ = _read(dense, held, jnp.arange(LAYERS))
  figures, spread = {"full": float(full)}, 0.0
  for speedup in SPEEDUPS:
    even = kept_layers(LAYERS, speedup)
    for name, kept in (("even", even), ("first", tuple(range(len(even))))):
      tuned = _tune(dense, given, kept, 2 if quick else STEPS)
      for when, model in (("", dense), ("_tuned", tuned)):
        right, depth = _read(model, held, jnp.array(kept))
        figures[f"{name}_{len(kept)}{when}"] = float(right)
        spread = max(spread, float(depth.std()))
  counts = [len(kept_layers(LAYERS, speedup)) for speedup in SPEEDUPS]
  figures["spread_of_layers"] = spread
  parts = [
    f"{n} of {LAYERS} layers kept: {figures[f'even_{n}']:.3f} evenly,"
    f" {figures[f'first_{n}']:.3f} the first; tuned"
    f" {figures[f'even_{n}_tuned']:.3f} and {figures[f'first_{n}_tuned']:.3f}"
    for n in counts
  ]
  words = (
    f"accuracy {full:.3f} of all layers; {'; '.join(parts)}; layers per token"
    f" vary by {spread:.0f}"
  )
  better = [
    figures[f"even_{n}{when}"] > figures[f"first_{n}{when}"]
    for n in counts
    for when in ("", "_tuned")
  ]
  return Headline(words, figures, all(better) and spread == 0)


@jax.jit
def _read(model, text, kept):
  """`(accuracy, layers of each byte)` of what follows the prompt."""
  stack = Partial(unified_skip, kept=kept)
  cache = model(text[:, :PROMPT], model.empty_cache(*text.shape)).cache

  def step(cache, token):
    out = model(token[:, None], cache, stack=stack)
    return out.cache, (out.logits[:, 0], out.depth[:, 0])

  _, (logits, depth) = jax.lax.scan(step, cache, text[:, PROMPT:-1].T)
  return accuracy(logits, text[:, PROMPT + 1 :].T), depth


def _tune(model, text, kept: tuple[int, ...], steps: int):
  """The model after training without the other layers, by Adam."""
  part = jax.tree.map(lambda a: a, model)  # a copy
  part.layers = specialize(model.layers, kept)
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))

  @jax.jit
  def step(part, state, batch):
    def loss(part):
      logits = part(batch[:, :-1]).logits
      return cross_entropy(logits, batch[:, 1:]).mean()

    updates, state = optimizer.update(jax.grad(loss)(part), state)
    return optax.apply_updates(part, updates), state

  state, draw = optimizer.init(part), np.random.default_rng(0)
  for _ in range(steps):
    batch = text[draw.integers(0, len(text), BATCH)]
    part, state = step(part, state, batch)
  put = lambda all_, some: all_.at[jnp.array(kept)].set(some)
  layers = jax.tree.map(put, model.layers, part.layers)
  part.layers = layers
  return part
