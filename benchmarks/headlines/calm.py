# SPDX-License-Identifier: Apache-2.0
"""CALM: fewer layers at a risk that was promised beforehand.

A threshold is calibrated on training files so that a text is expected to lose
at most `DELTA` of its right bytes, or else so that at most `DELTA` of its bytes
differ; what it does is measured on other files.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from adaptivejax.core.losses import accuracy
from adaptivejax.decode import calibrate, excess_error, inconsistency
from adaptivejax.methods.depth import calm
from adaptivejax.nn import MARGIN, MAX_PROB, STATE
from adaptivejax.nn.confidence import exit_confidence
from adaptivejax.nn.stack import every_layer
from benchmarks.headlines import Headline, beds

PAPER = "potential speedup of up to 3x while provably maintaining performance"
DELTA, EPSILON = 0.03, 0.05
SURE = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
STEADY = (0.999, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.9)
CASES = {
  "margin": (MARGIN, SURE, excess_error),
  "max_prob": (MAX_PROB, SURE[:-1], excess_error),
  "state": (STATE, STEADY, excess_error),
  "same": (MARGIN, SURE, inconsistency),
}


def measure(quick: bool) -> Headline:
  model, text = beds.byte_lm("exits", quick), beds.texts(20 if quick else 300)
  given = beds.texts(20 if quick else 400, split="train")
  found = {}
  for name, (by, levels, loss) in CASES.items():
    made = calibrate(
      model,
      given,
      Partial(calm, measure=by),
      levels[:2] if quick else levels,
      delta=DELTA,
      epsilon=EPSILON,
      loss=loss,
    )
    found[name] = read(model, text, made.threshold, by)
    found[name]["threshold"] = made.threshold
  for kind in ("exits", "dense"):  # one threshold, without a promise
    found[f"half_{kind}"] = read(beds.byte_lm(kind, quick), text, 0.5, MAX_PROB)
  layers = beds.MODEL.layers
  best = min(list(CASES)[:3], key=lambda name: found[name]["layers"])
  one, same = found[best], found["same"]
  drop = one["full_accuracy"] - one["accuracy"]
  half, dense = found["half_exits"], found["half_dense"]
  words = (
    f"promised to lose {DELTA:.0%} of right bytes at most ({1 - EPSILON:.0%}"
    f" sure): {one['layers']:.2f} of {layers} layers by {best}, accuracy"
    f" {one['accuracy']:.3f} against {one['full_accuracy']:.3f}; promised to"
    f" change {DELTA:.0%} of bytes: {same['layers']:.2f} layers, consistency"
    f" {same['consistency']:.1%}. At probability 0.5 it is"
    f" {half['consistency']:.1%}, with the true keys of skipped layers"
    f" {half['true_keys']:.1%}, in a model not trained for exits"
    f" {dense['consistency']:.1%}"
  )
  figures = {
    f"{name}_{key}": value
    for name, one in found.items()
    for key, value in one.items()
  }
  kept = drop <= DELTA and same["consistency"] >= 1 - DELTA
  return Headline(words, figures, bool(kept and one["layers"] <= 0.7 * layers))


def read(model, text, threshold: float, by) -> dict[str, float]:
  """What a threshold does to text that is read as if decoding it."""
  out = _read(model, text, jnp.float32(threshold), by)
  return {name: float(value) for name, value in out.items()}


@jax.jit
def _read(model, text, threshold, by):
  whole = model(text[:, :-1], stack=every_layer)
  full = whole.logits[:, 1:]
  cache = model(text[:, :1], model.empty_cache(*text.shape)).cache
  stack = Partial(calm, threshold=threshold, measure=by)

  def step(cache, token):
    out = model(token[:, None], cache, stack=stack)
    return out.cache, (out.logits[:, 0].argmax(-1), out.depth[:, 0])

  _, (said, depth) = jax.lax.scan(step, cache, text[:, 1:-1].T)
  sure = exit_confidence(whole.hidden, model.readout, by) >= threshold
  first = sure.at[:, -1].set(True).argmax(1).reshape(text[:, 1:].shape)
  each = jax.lax.map(lambda h: model.readout(h).argmax(-1), whole.hidden)
  alone = jnp.take_along_axis(each, first[None], 0)[0, :, 1:]
  return {
    "layers": depth.mean(),
    "consistency": (full.argmax(-1) == said.T).mean(),
    "true_keys": (alone == full.argmax(-1)).mean(),
    "accuracy": (text[:, 2:] == said.T).mean(),
    "full_accuracy": accuracy(full, text[:, 2:]),
  }
