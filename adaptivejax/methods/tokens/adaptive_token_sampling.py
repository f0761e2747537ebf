# SPDX-License-Identifier: Apache-2.0
r"""Adaptive Token Sampling (ATS): as many tokens as the class token looks at.

Fayyaz et al., 2022, https://arxiv.org/abs/2111.15667

A token's significance is the class token's attention to it times the length of
its value, summed over heads (eqs. 3 and 5),

    S_j = A_1j ||V_j|| / sum_i A_1i ||V_i||,    j, i > 1,

and K evenly spread points u_k = (2k - 1) / 2K are sent through the inverse of
its cumulative sum; a token that is hit stays, once, the others are gone (sec.
3.2).  Where attention is peaked many points hit the same token, so fewer stay
than K: how many depends on the input.  Needs no training.

Primitive: `keep_only` and `settle` (`core.token_merging`), in a stack that is
`adapting` over rungs (`nn.tokens`).
Departs: token j is hit if the number of points below the cumulative sum grows
at j, which needs no search; tokens come in their order, where the published
code sorts them by significance first and spreads its points over what it finds.
The tokens that go are attended from, in the layer that gives them up.
Axes: L layers, B batch, N tokens, H heads, D features.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptivejax.core.token_merging import keep_only
from adaptivejax.nn.encoder_layer import Seen
from adaptivejax.nn.setting import refuse_nan
from adaptivejax.nn.stack import StackOutput, checked_by, layer_count
from adaptivejax.nn.tokens import Decision, adapting, layers_due


def significance(seen: Seen) -> Float[Array, "B N"]:
  """S: shares of all tokens but the class token, which has 0 (eqs. 3, 5)."""
  length = jnp.linalg.norm(seen.keys.v.astype(jnp.float32), axis=-1)
  score = (seen.first * length).sum(1).at[:, 0].set(0)
  total = score.sum(1, keepdims=True)
  return score / jnp.where(total > 0, total, 1)


def sampled(
  scores: Float[Array, "B N"], samples: Float[Array, ""] | float
) -> Bool[Array, "B N"]:
  """Which tokens K points hit, and the first; infinitely many hit all."""
  upto = jnp.cumsum(scores, axis=1)
  below = lambda mass: jnp.floor(samples * mass + 0.5)
  before = jnp.pad(upto, ((0, 0), (1, 0)))[:, :-1]
  hit = below(upto) > below(before)
  return (hit | jnp.isinf(samples)).at[:, 0].set(True)


def _check(total, *, samples, at=None, **rest):
  del rest
  layers_due(at, total)
  refuse_nan(samples=samples)


@checked_by(_check)
def adaptive_token_sampling(
  layers,
  x: Float[Array, "B N D"],
  positions,
  cache=None,
  *,
  readout,
  key=None,
  samples: Float[Array, ""] | float,
  at: Sequence[int] | Bool[Array, " L"] | None = None,
) -> StackOutput:
  """A stack that keeps the tokens which K points hit.

  Args:
    samples: K, at most so many tokens stay besides the class token; 0 keeps
      that alone, infinity all (dynamic).
    at: layers, counted from 0, or a mask of layers (dynamic); in the paper 3 to
      11 of 12, all if not given.

  Other arguments as in `nn.stack`.  What a token was when it went is in
  `notes.left`.
  """
  del cache, readout, key

  def decide(size, seen, samples):
    keep = sampled(significance(seen), samples)
    return Decision(keep_only(keep, size > 0), size)

  due = layers_due(at, layer_count(layers))
  samples = jnp.asarray(samples, jnp.float32)
  return adapting(
    layers,
    x,
    positions,
    decide,
    samples,
    due,
    proportional=False,
    remember=True,
  )
