# SPDX-License-Identifier: Apache-2.0
r"""Token merging (ToMe): tokens that say the same become one.

Bolya et al., 2023, https://arxiv.org/abs/2210.09461

Between attention and feed-forward halves the tokens, split alternately in two
sets, choose each the most similar of the other set, by the cosine of keys
averaged over heads; the r most similar pairs become their mean, weighted by
sizes s (sec. 3).  A merged key stands for all it was made of ("proportional
attention", eq. 1):

    softmax(q k^T / sqrt(d) + log s).

`token_merging` merges a fixed number per layer, so shapes are static;
`similar_merging` all pairs above a cosine, as many as the input has.  The class
token never merges.  Needs no training.

Primitive: `bipartite_match` and `settle` (`core.token_merging`), in a stack
that is `shrinking`, or `adapting` over rungs (`nn.tokens`).
Departs: tokens stay in their order, where the published code puts one set
before the other, which only changes later splits; the threshold is ours.
Axes: L layers, B batch, N tokens, D features.
"""

from collections.abc import Sequence

from jaxtyping import Array, Bool, Float

from adaptivejax.core.token_merging import (
  bipartite_match,
  merge_best,
  merge_similar,
  most_merges,
)
from adaptivejax.nn.stack import StackOutput, checked_by, layer_count
from adaptivejax.nn.tokens import Decision, adapting, layers_due, shrinking


def merged_counts(
  tokens: int, merges: int | Sequence[int], layers: int, *, protected: int = 1
) -> tuple[int, ...]:
  """Tokens after each layer, where `merges` go, or as many as can; static."""
  each = [merges] * layers if isinstance(merges, int) else list(merges)
  counts = []
  for r in each:
    tokens -= min(r, most_merges(tokens, protected=protected))
    counts.append(tokens)
  return tuple(counts)


def _check_merges(total, *, merges, protected=1, **rest):
  del rest
  each = [merges] if isinstance(merges, int) else list(merges)
  if min([protected, *each]) < 0 or len(each) not in (1, total):
    raise ValueError(
      f"{merges=} must be at least 0, one number or {total}, one for each"
      f" layer, and {protected=} at least 0."
    )


@checked_by(_check_merges)
def token_merging(
  layers,
  x: Float[Array, "B N D"],
  positions,
  cache=None,
  *,
  readout,
  key=None,
  merges: int | Sequence[int],
  protected: int = 1,
) -> StackOutput:
  """A stack that merges a fixed number of tokens in each layer.

  Args:
    merges: r, one for all layers or one for each; half of the tokens is the
      most that go at once (static).
    protected: first tokens that stay themselves (static).

  Other arguments as in `nn.stack`.
  """
  del cache, readout, key
  total, tokens = layer_count(layers), x.shape[1]
  counts = merged_counts(tokens, merges, total, protected=protected)

  def decide(size, seen, counts):
    match = bipartite_match(seen.metric, size > 0, protected=protected)
    before, after = counts
    return Decision(merge_best(match, before - after, size.shape[1]), size)

  return shrinking(layers, x, positions, decide, counts, proportional=True)


def similar_merging(
  layers,
  x: Float[Array, "B N D"],
  positions,
  cache=None,
  *,
  readout,
  key=None,
  threshold: Float[Array, ""] | float,
  at: Sequence[int] | Bool[Array, " L"] | None = None,
  protected: int = 1,
) -> StackOutput:
  """A stack that merges whatever is similar.

  Args:
    threshold: cosine of keys above which two tokens are one; 1 or more merges
      nothing, less than -1 every token that has a partner (dynamic).
    at: layers, counted from 0, after whose attention tokens merge, or a mask of
      layers (dynamic); all if not given.
    protected: first tokens that stay themselves (static).

  Other arguments as in `nn.stack`.
  """
  del cache, readout, key

  def decide(size, seen, threshold):
    match = bipartite_match(seen.metric, size > 0, protected=protected)
    return Decision(merge_similar(match, threshold, size.shape[1]), size)

  due = layers_due(at, layer_count(layers))
  return adapting(
    layers, x, positions, decide, threshold, due, proportional=True
  )
