# SPDX-License-Identifier: Apache-2.0
"""DELTA: text foretold with half the layers reading a third of the keys.

Held-out text is read byte by byte.  Beside DELTA the same number of last pages
in the same layers: where these do as well, its choice is not put to the test.
"""

import jax
import numpy as np

from adaptivejax.decode import score
from adaptivejax.methods.attention import DELTA
from adaptivejax.nn import with_look
from benchmarks.headlines import Headline, beds

PAPER = (
  "reasoning is as accurate as with all keys (GPQA-Diamond, AIME) with up to 5"
  " times fewer tokens attended to, 1.5 times as fast end to end (unverified)"
)
FULL, PAGE, PAGES = (0, 1, 3), 4, 4
LENGTH = beds.DATA.context
NEAR = 0.02
"""Loss of bits that counts as none."""


def measure(quick: bool) -> Headline:
  model = beds.byte_lm("dense", quick)
  text = beds.texts(20 if quick else 200)
  look = lambda full, recent: with_look(
    model, DELTA(full, pages=PAGES, page=PAGE, recent=recent)
  )
  bits = {
    "all": _bits(model, text),
    "delta": _bits(look(FULL, 1), text),
    "recent": _bits(look(FULL, PAGES), text),
    "once": _bits(look((0,), 1), text),
  }
  figures = {name: float(each.mean()) for name, each in bits.items()}
  gain = bits["recent"] - bits["delta"]
  figures["gain"] = float(gain.mean())
  figures["standard_error"] = float(gain.std() / np.sqrt(len(gain)))
  there = np.arange(LENGTH // 2, LENGTH)
  figures["fewer"] = float(there.sum() / (PAGE * PAGES * len(there)))
  more = lambda name: 100 * (figures[name] / figures["all"] - 1)
  words = (
    f"bits per byte, {figures['all']:.3f} with all keys; layers"
    f" {', '.join(map(str, FULL))} of {beds.MODEL.layers} full, the others"
    f" {figures['fewer']:.1f} times fewer keys: {more('delta'):+.1f}%; by the"
    f" last keys instead {more('recent'):+.1f}% (a gain of"
    f" {figures['gain']:.3f} ± {figures['standard_error']:.3f} bits); one full"
    f" layer for all others {more('once'):+.1f}%; at a context of {LENGTH}"
    " bytes the last keys say nearly all"
  )
  near = figures["delta"] <= (1 + NEAR) * figures["all"]
  needed = figures["gain"] > 2 * figures["standard_error"]
  return Headline(words, figures, (True if needed else None) if near else False)


@jax.jit
def _nats(model, text):
  return score(model, text).nats[:, LENGTH // 2 :].mean(1)


def _bits(model, text) -> np.ndarray:
  """Bits per byte of the last half of each window."""
  return np.asarray(_nats(model, text)) / np.log(2)
