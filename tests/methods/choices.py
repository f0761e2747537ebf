# SPDX-License-Identifier: Apache-2.0
"""What looks that choose are compared with: sets of positions, by NumPy.

The texts, and how a look reads them, are those of `kv`: rows of different
prompts, which are read densely, then token by token.

Axes: B batch, T tokens, H query heads, G key heads, W width.
"""

import numpy as np

from tests.methods import kv
from tests.methods.kv import LENGTHS, B, G, H, T

R = H // G


def best(scores, keep, first=()):
  """Indices of the `keep` best of a list, ties by index, those `first` ones."""
  order = sorted(range(len(scores)), key=lambda i: (i not in first, -scores[i]))
  return order[: max(keep, len(first))]


def tokens_of(pages, page, t):
  """Positions up to t that lie in these pages."""
  return [j for j in range(t + 1) if j // page in set(pages)]


def sets(rule, q, k):
  """The choice of every decoded token: `{(b, t, g): positions}`.

  `rule(q [H, W], k [t + 1, G, W], t)` gives a list of positions for each g.
  """
  chosen = {}
  for b in range(B):
    for t in range(LENGTHS[b], T):
      for g, some in enumerate(rule(q[b, t], k[b, : t + 1], t)):
        chosen[b, t, g] = some
  return chosen


def attended(chosen, q, k, v):
  """`out [B, T, H, W]` where each token sees what is chosen, prompts all."""
  out = np.zeros(q.shape)
  for b, t, h in np.ndindex(B, T, H):
    g = h // R
    some = list(chosen.get((b, t, g), range(t + 1)))
    given = kv.softmax(k[b, some, g] @ q[b, t, h] / np.sqrt(q.shape[-1]))
    out[b, t, h] = given @ v[b, some, g]
  return out


def placed():
  """`(q, k, v)` of `kv`, with rotary positions."""
  q, k, v = kv.text()
  return *kv.placed(q, k), v


def check(look, rule, *, tolerance=2e-5, spoil=None, step=None):
  """The look finds what is found in the sets of the rule."""
  q, k, v = placed()
  out, _ = kv.read(look, q, k, v, spoil=spoil, step=step)
  chosen = sets(rule, q, k)
  want = attended(chosen, q, k, v)
  np.testing.assert_allclose(out, want, atol=tolerance)
  full = attended({}, q, k, v)
  return chosen, float(np.abs(want - full).max())
