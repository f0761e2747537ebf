# SPDX-License-Identifier: Apache-2.0
r"""EViT: tokens that the class token does not look at become one.

Liang et al., 2022, https://arxiv.org/abs/2202.07800

At a few layers, between attention and feed-forward halves, the class token's
attention a, averaged over heads, ranks the others; the share `keep` of highest
a stay, and the rest is fused into a single token (sec. 3.2),

    x_fused = sum_i a_i x_i / sum_i a_i    over those that do not stay,

that goes on like any other.  Needs no training, though the paper trains on.

Primitive: `top_k`, `keep_only` and `settle` (`core.token_merging`), in a stack
that is `shrinking` (`nn.tokens`).
Departs: the weighted average is divided by the sum of its weights (the
published code leaves that out), and the fused token stands in the place of the
first that it is made of; keys have equal weight, as there.
Axes: L layers, B batch, N tokens, D features.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from adaptivejax.core.select import top_k
from adaptivejax.core.token_merging import keep_only
from adaptivejax.nn.stack import StackOutput, checked_by, layer_count
from adaptivejax.nn.tokens import Decision, layers_due, shrinking


def kept_counts(
  tokens: int, keep: float, at: Sequence[int], layers: int, *, fuse: bool = True
) -> tuple[int, ...]:
  """Tokens after each layer, the class token and the fused included; static."""
  counts = []
  for l in range(layers):
    if l in at:
      stay = 1 + math.ceil(keep * (tokens - 1))
      tokens = min(tokens, stay + fuse)
    counts.append(tokens)
  return tuple(counts)


def _check_keep(total, *, keep, at, **rest):
  del rest
  layers_due(tuple(at), total)
  if not 0 <= keep <= 1:
    raise ValueError(f"{keep=} must lie in 0..1, the share of tokens to stay.")


@checked_by(_check_keep)
def token_pruning(
  layers,
  x: Float[Array, "B N D"],
  positions,
  cache=None,
  *,
  readout,
  key=None,
  keep: float,
  at: Sequence[int],
  fuse: bool = True,
) -> StackOutput:
  """A stack that keeps, at some layers, the tokens of most attention.

  Args:
    keep: share of the tokens that stay at each of these layers, without the
      class token, rounded up (static).
    at: the layers, counted from 0; in the paper 3, 6 and 9 of 12 (static).
    fuse: the rest becomes one token, else it is gone (static).

  Other arguments as in `nn.stack`; the first token is that of the class.
  """
  del cache, readout, key
  counts = kept_counts(x.shape[1], keep, at, layer_count(layers), fuse=fuse)

  def decide(size, seen, counts):
    live, weight = size > 0, seen.first.mean(1)
    ranked = jnp.where(live, weight, -1).at[:, 0].set(jnp.inf)
    # one slot is for the fused, unless everybody fits
    room = counts[1] - fuse
    room = jnp.where(live.sum(1) <= counts[1], counts[1], room)
    into = keep_only(top_k(ranked, room), live, fuse=fuse)
    return Decision(into, weight)

  return shrinking(
    layers,
    x,
    positions,
    decide,
    counts,
    proportional=False,
    remember=not fuse,
  )
