# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: text longer than any the model was trained on.

Held-out text, sixteen times as long as a training window, is read with all
keys, with a window, and with sinks and a window; each cache that is bounded
holds as many keys as a training window has bytes.
"""

import jax
import jax.numpy as jnp

from adaptivejax.core.losses import cross_entropy
from adaptivejax.methods.kv import StreamingLLM
from adaptivejax.nn import with_look
from benchmarks.headlines import Headline, beds

PAPER = (
  "perplexity is stable over 4 million tokens with 4 sinks; with a window alone"
  " it collapses: 5158 against 5.40, Llama-2-13B (unverified)"
)
TRAINED = beds.DATA.context
LENGTH, SINKS = 16 * TRAINED, 4


def measure(quick: bool) -> Headline:
  model = beds.byte_lm("dense", quick)
  text = beds.texts(2 if quick else 60, LENGTH)
  reads = {
    "all": model,
    "window": with_look(model, StreamingLLM(0, TRAINED)),
    "one": with_look(model, StreamingLLM(1, TRAINED - 1)),
    "sinks": with_look(model, StreamingLLM(SINKS, TRAINED - SINKS)),
  }
  figures = {}
  for name, reader in reads.items():
    bits = _bits(reader, text)
    figures[f"{name}_trained"] = float(bits[:, TRAINED // 2 : TRAINED].mean())
    figures[f"{name}_beyond"] = float(bits[:, 2 * TRAINED :].mean())
    figures[f"{name}_last"] = float(bits[:, -4 * TRAINED :].mean())
  words = (
    f"bits per byte at {2 * TRAINED}..{LENGTH} of texts, trained on {TRAINED}:"
    f" {figures['sinks_beyond']:.2f} with {SINKS} sinks and a window,"
    f" {figures['one_beyond']:.2f} with one sink,"
    f" {figures['window_beyond']:.2f} with the window alone,"
    f" {figures['all_beyond']:.2f} with all keys"
    f" ({figures['all_trained']:.2f} within the trained length); in the last"
    f" quarter {figures['sinks_last']:.2f} with the sinks"
  )
  stable = figures["sinks_beyond"] <= 1.05 * figures["sinks_trained"]
  needed = figures["window_beyond"] > 1.05 * figures["sinks_beyond"]
  return Headline(words, figures, stable and needed)


@jax.jit
def _bits(model, text):
  """Bits of every byte but the first, f32[N, S - 1]; few texts at a time."""

  def some(text):
    out = model(text[None, :-1])
    return cross_entropy(out.logits, text[None, 1:])[0] / jnp.log(2)

  return jax.lax.map(some, text)
