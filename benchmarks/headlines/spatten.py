# SPDX-License-Identifier: Apache-2.0
"""SpAtten: few keys in deep layers, against as many for all layers.

Held-out text is read byte by byte; what counts is how well bytes are foretold
once there are some to look at, by the keys that a layer reads on average.
"""

import jax.numpy as jnp
import numpy as np

from adaptivejax.decode import score
from adaptivejax.methods.kv import H2O, SpAtten
from adaptivejax.nn import with_look
from benchmarks.headlines import Headline, beds

PAPER = (
  "by pruning tokens and heads (and fewer bits) attention reads a tenth of the"
  " memory with no loss of accuracy, after fine-tuning (unverified)"
)
LENGTH, LAYERS = beds.DATA.context, beds.MODEL.layers
SHARES, RECENT = (0.1, 0.2, 0.45), 8


def measure(quick: bool) -> Headline:
  model = beds.byte_lm("dense", quick)
  text = beds.texts(8 if quick else 120)
  bits = lambda look: _bits(with_look(model, look), text)
  figures, words = {"full": bits(SpAtten())}, []
  more = lambda name: 100 * (figures[name] / figures["full"] - 1)
  for share in SHARES:
    kept = float(np.mean((1 - share) ** np.arange(LAYERS)))
    keys = round(kept * LENGTH / 2)
    figures[f"kept_{share}"] = kept
    figures[f"tokens_{share}"] = bits(SpAtten(share, recent=RECENT))
    figures[f"newest_{share}"] = bits(SpAtten(share))
    figures[f"h2o_{share}"] = bits(H2O(keys, keys, normalise=True))
    words.append(
      f"{kept:.0%} of the keys, {share:.0%} pruned a layer:"
      f" {more(f'tokens_{share}'):+.1f}%"
      f" ({more(f'newest_{share}'):+.1f}% if but the newest must stay,"
      f" H2O with as many {more(f'h2o_{share}'):+.1f}%)"
    )
  figures["heads_0.25"] = bits(SpAtten(0.0, 0.25))
  words.append(f"a head less a layer {more('heads_0.25'):+.1f}%")
  start = (
    f"bits per byte, {figures['full']:.3f} with all keys; the last {RECENT}"
  )
  start += " kept, "
  holds = more("tokens_0.45") <= 1
  return Headline(start + "; ".join(words), figures, holds)


def _bits(model, text) -> float:
  """Bits per byte of the last three quarters of each window."""
  nats = score(model, text).nats[:, LENGTH // 4 :]
  return float(nats.mean() / jnp.log(2))
