# SPDX-License-Identifier: Apache-2.0
"""H2O: keys kept by the attention they got, against the recent ones alone.

Held-out text is read byte by byte with a small cache; what counts is how well
bytes are foretold once the cache has been full for a while.
"""

import jax.numpy as jnp

from adaptivejax.decode import score
from adaptivejax.methods.kv import H2O
from adaptivejax.nn import with_look
from benchmarks.headlines import Headline, beds

PAPER = (
  "with 20 % of the keys, half of them heavy hitters, models are about as good"
  " as with all; with the recent ones alone they are not (unverified)"
)
LENGTH = beds.DATA.context
SHARES = (0.1, 0.2, 0.4)


def measure(quick: bool) -> Headline:
  model = beds.byte_lm("dense", quick)
  text = beds.texts(20 if quick else 300)
  bits = lambda look: _bits(with_look(model, look), text)
  figures = {"full": _bits(model, text)}
  for share in SHARES:
    half = round(share * LENGTH / 2)
    figures[f"h2o_{share:.0%}"] = bits(H2O(half, half))
    figures[f"normalised_{share:.0%}"] = bits(H2O(half, half, normalise=True))
    figures[f"recent_{share:.0%}"] = bits(H2O(0, 2 * half))
  figures = {name: float(value) for name, value in figures.items()}
  more = lambda name: 100 * (figures[name] / figures["full"] - 1)
  words = "; ".join(
    f"{share:.0%} of the keys: {more(f'h2o_{share:.0%}'):+.1f}%"
    f" ({more(f'normalised_{share:.0%}'):+.1f}% by the mean),"
    f" the recent alone {more(f'recent_{share:.0%}'):+.1f}%"
    for share in SHARES
  )
  words = f"bits per byte, {figures['full']:.3f} with all keys; {words}"
  holds = more("h2o_20%") <= 5 and figures["h2o_20%"] < figures["recent_20%"]
  return Headline(words, figures, holds)


def _bits(model, text):
  """Bits per byte of the last three quarters of each window."""
  nats = score(model, text).nats[:, LENGTH // 4 :]
  return nats.mean() / jnp.log(2)
