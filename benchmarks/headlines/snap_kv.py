# SPDX-License-Identifier: Apache-2.0
"""SnapKV: a prompt cut down to what its last bytes look at.

Prompts are held-out text; what counts is how well the bytes after them are
foretold, against prompts that are cut down to their last bytes.
"""

import jax.numpy as jnp

from adaptivejax.decode import score
from adaptivejax.methods.kv import SnapKV
from adaptivejax.nn import with_look
from benchmarks.headlines import Headline, beds

PAPER = (
  "8.2 times less memory and 3.6 times faster decoding of prompts of 16K"
  " tokens, as good as with all keys (unverified)"
)
PROMPT, WINDOW = 48, 4
CAPACITIES = (6, 8, 12, 24)


def measure(quick: bool) -> Headline:
  model = beds.byte_lm("dense", quick)
  text = beds.texts(20 if quick else 500)
  bits = lambda look: _bits(with_look(model, look), text)
  figures = {"full": float(_bits(model, text))}
  for count in CAPACITIES:
    snap = SnapKV(count, window=WINDOW, kernel=3)
    figures[f"snap_{count}"] = float(bits(snap))
    last = SnapKV(count, window=count, kernel=1)
    figures[f"last_{count}"] = float(bits(last))
  more = lambda name: 100 * (figures[name] / figures["full"] - 1)
  words = "; ".join(
    f"{count} keys {more(f'snap_{count}'):+.1f}%"
    f" (the last {count} {more(f'last_{count}'):+.1f}%)"
    for count in CAPACITIES
  )
  words = (
    f"bits per byte after prompts of {PROMPT}, {figures['full']:.3f} with all"
    f" keys; cut down to {words}"
  )
  eighth = CAPACITIES[0]
  close = more(f"snap_{eighth}") <= 5
  better = figures[f"snap_{eighth}"] < figures[f"last_{eighth}"]
  return Headline(words, figures, close and better)


def _bits(model, text):
  """Bits per byte after the prompt."""
  return score(model, text, prompt=PROMPT).nats.mean() / jnp.log(2)
