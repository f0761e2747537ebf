# SPDX-License-Identifier: Apache-2.0
"""CALM: fewer layers at a risk that was promised beforehand.

A threshold is calibrated on training files so that at most `DELTA` of the bytes
differ from those of the full model; what it does is measured on other files.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from adaptivejax.core.losses import accuracy
from adaptivejax.decode import calibrate
from adaptivejax.methods.depth import calm
from adaptivejax.nn import MARGIN, MAX_PROB, STATE
from benchmarks.headlines import Headline, beds

PAPER = "potential speedup of up to 3x while provably maintaining performance"
DELTA, EPSILON = 0.03, 0.05
LEVELS = {
  "margin": (MARGIN, (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)),
  "max_prob": (MAX_PROB, (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),
  "state": (STATE, (0.999, 0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.9)),
}


def measure(quick: bool) -> Headline:
  model, text = beds.byte_lm("exits", quick), beds.texts(20 if quick else 300)
  given = beds.texts(20 if quick else 500, split="train")
  figures, kept = {}, {}
  for name, (by, levels) in LEVELS.items():
    stack = Partial(calm, measure=by)
    found = calibrate(
      model, given, stack, levels[:2] if quick else levels,
      delta=DELTA, epsilon=EPSILON,
    )  # fmt: skip
    level = jnp.float32(found.threshold)
    out = _read(model, text, Partial(calm, measure=by, threshold=level))
    kept[name] = {k: float(v) for k, v in out.items()}
    kept[name]["threshold"] = found.threshold
    figures |= {f"{name}_{k}": v for k, v in kept[name].items()}
  plain = Partial(calm, threshold=jnp.float32(0.5), measure=MAX_PROB)
  for kind in ("exits", "dense"):
    out = _read(beds.byte_lm(kind, quick), text, plain)
    figures[f"half_{kind}_layers"] = float(out["layers"])
    figures[f"half_{kind}_consistency"] = float(out["consistency"])
  layers = beds.MODEL.layers
  best = min(kept, key=lambda name: kept[name]["layers"])
  of = kept[best]
  safe = all(one["consistency"] >= 1 - DELTA for one in kept.values())
  words = (
    f"at most {DELTA:.0%} of bytes may differ ({1 - EPSILON:.0%} sure):"
    f" {of['layers']:.2f} of {layers} layers by {best}, consistency"
    f" {of['consistency']:.1%}, accuracy {of['accuracy']:.3f} against"
    f" {of['full_accuracy']:.3f}; without training for exits consistency at 0.5"
    f" falls from {figures['half_exits_consistency']:.1%} to"
    f" {figures['half_dense_consistency']:.1%}"
  )
  return Headline(words, figures, safe and of["layers"] <= 0.7 * layers)


@jax.jit
def _read(model, text, stack):
  """Reads the text as if decoding it, with exits and without."""
  full = model(text[:, :-1]).logits[:, 1:]
  cache = model.empty_cache(*text.shape)
  cache = model(text[:, :1], cache).cache

  def step(cache, token):
    out = model(token[:, None], cache, stack=stack)
    return out.cache, (out.logits[:, 0], out.depth[:, 0])

  _, (logits, depth) = jax.lax.scan(step, cache, text[:, 1:-1].T)
  logits = jnp.moveaxis(logits, 0, 1)
  return {
    "layers": depth.mean(),
    "consistency": (logits.argmax(-1) == full.argmax(-1)).mean(),
    "accuracy": accuracy(logits, text[:, 2:]),
    "full_accuracy": accuracy(full, text[:, 2:]),
  }
