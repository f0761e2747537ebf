# SPDX-License-Identifier: Apache-2.0
"""Which tokens follow two tokens: counted in a corpus, and learned from a row.

A table of tri-grams is a draft model that costs a look-up.  `TrigramTable` is
that of a corpus, shared by all rows and never written: an open-addressed hash
table, so that a look-up is `PROBES` reads.  `Recent` is what one row has added
to it: a list of its own last tri-grams, searched by comparing with all of them.
Functions are of one row; `vmap` them.

Axes: S slots, K successors per context, M tri-grams of a row, W tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.trees import ABSENT, Tree

PROBES = 8
"""Slots in which a context may lie."""


class TrigramTable(NamedTuple):
  """The likeliest successors of every context of a corpus.

  Attributes:
    context: two tokens; -1 where a slot is empty, i32[S, 2].
    tokens: their successors, the likeliest first; -1 for none, i32[S, K].
    share: of all that follow this context, f32[S, K].
  """

  context: Array
  tokens: Array
  share: Array

  @classmethod
  def build(
    cls, texts: Iterable[Sequence[int] | np.ndarray], *, successors: int = 12
  ) -> "TrigramTable":
    """Counts on the host; of equals, the lower tokens are kept.

    Args:
      texts: tokens of one text each; tri-grams do not cross them.  There may be
        none: a table that knows nothing.
      successors: how many to keep per context, K (static).
    """
    if successors < 1:
      raise ValueError(f"{successors=} must be at least 1 per context.")
    cut = np.lib.stride_tricks.sliding_window_view
    found = [cut(np.asarray(text), 3) for text in texts if len(text) > 2]
    found = np.concatenate([np.zeros((0, 3), np.int32), *found])
    if found.min(initial=0) < 0 or found.max(initial=0) >= 2**21:
      raise ValueError(
        f"tokens must lie in 0..{2**21 - 1}; got {found.min()}..{found.max()}."
      )
    a, b, c = found.T.astype(np.int64)
    code, count = np.unique(a << 42 | b << 21 | c, return_counts=True)
    context, group = np.unique(code >> 21, return_inverse=True)
    order = np.lexsort((-count, group))  # stable: equals by their tokens
    code, count, group = code[order], count[order], group[order]
    context = np.stack([context >> 21, context % 2**21], 1).astype(np.int32)
    rank = np.arange(len(group)) - np.searchsorted(group, group)
    total = np.bincount(group, count, len(context))
    kept = rank < successors
    slot, slots = _place(context)
    at = slot[group[kept]], rank[kept]
    table = np.full((slots, 2), -1, np.int32)
    tokens = np.full((slots, successors), -1, np.int32)
    share = np.zeros((slots, successors), np.float32)
    table[slot] = context
    tokens[at] = code[kept] % 2**21
    share[at] = (count / total[group])[kept]
    return cls(*map(jnp.asarray, (table, tokens, share)))

  def lookup(
    self, context: Int[Array, "2"]
  ) -> tuple[Int[Array, " K"], Float[Array, " K"]]:
    """Successors and their shares: -1 and 0 for none."""
    slots = self.context.shape[0]
    slot = (_home(context, slots) + np.arange(PROBES)) % slots
    hit = (self.context[slot] == context).all(-1) & (context >= 0).all()
    slot = slot[hit.argmax()]
    tokens = jnp.where(hit.any(), self.tokens[slot], -1)
    return tokens, jnp.where(hit.any(), self.share[slot], 0)


class Recent(NamedTuple):
  """What a row has added to the table; when full, the oldest goes.

  Attributes:
    trigrams: -1 where there is none, i32[M, 3].
    weight: added to their share, f32[M].
    seen: tri-grams ever put in, i32[].
  """

  trigrams: Array
  weight: Array
  seen: Array

  @classmethod
  def empty(cls, size: int) -> "Recent":
    """Room for `size` tri-grams (static)."""
    none = jnp.full((size, 3), -1, jnp.int32)
    return cls(none, jnp.zeros(size), jnp.int32(0))

  def update(
    self,
    window: Int[Array, " W"],
    rate: Float[Array, ""] | float,
    cap: Float[Array, ""] | float,
  ) -> "Recent":
    """Adds `rate` for every tri-gram in `window`, up to `cap` in all.

    Args:
      window: the last tokens of the row; -1 where there is none.  At most M + 2
        of them, or a tri-gram could be put in and pushed out at once.
    """
    size, length = len(self.weight), len(window)
    if length > size + 2:
      raise ValueError(
        f"a window of {length} tokens has {length - 2} tri-grams, more than the"
        f" {size} there is room for."
      )
    if length < 3:
      return self
    found = jnp.stack([window[:-2], window[1:-1], window[2:]], 1)
    equal = lambda a, b: (a[:, None] == b).all(-1) & (a >= 0).all(-1)[:, None]
    known, twins = equal(found, self.trigrams), equal(found, found)
    weight = self.weight + rate * known.sum(0)
    new = twins.any(1) & ~known.any(1) & ~jnp.tril(twins, -1).any(1)
    slot = (self.seen + jnp.cumsum(new) - 1) % size
    slot = jnp.where(new, slot, size)
    weight = weight.at[slot].set(rate * twins.sum(1), mode="drop")
    trigrams = self.trigrams.at[slot].set(found, mode="drop")
    seen = self.seen + new.sum(dtype=jnp.int32)
    return Recent(trigrams, jnp.minimum(weight, cap), seen)


def successors(
  table: TrigramTable,
  recent: Recent,
  context: Int[Array, "2"],
  cap: Float[Array, ""] | float,
) -> tuple[Int[Array, " KM"], Float[Array, " KM"]]:
  """Tokens after `context` and their weights, in no order.

  The weight of a token is its share in the corpus plus what the row has added,
  at most `cap`; 0 where the place holds no token.
  """
  tokens, share = table.lookup(context)
  follows = (recent.trigrams[:, :2] == context).all(-1) & (context >= 0).all()
  more = jnp.where(follows, recent.weight, 0)
  same = tokens[:, None] == recent.trigrams[:, 2]
  share += (same * more).sum(1)
  alone = jnp.where(same.any(0), 0, more)
  weight = jnp.concatenate([share, alone])
  return (
    jnp.concatenate([tokens, recent.trigrams[:, 2]]),
    jnp.minimum(weight, cap),
  )


def draft(
  table: TrigramTable,
  recent: Recent,
  context: Int[Array, "2"],
  rate: Float[Array, ""] | float,
  cap: Float[Array, ""] | float,
  nodes: int,
  depth: int,
) -> Tree:
  """The tree of the likeliest continuations by this table and this row."""
  follow = lambda context: successors(table, recent, context, cap)
  return likeliest(follow, context, rate, nodes, depth)


def likeliest(
  follow: Callable[[Array], tuple[Array, Array]],
  context: Int[Array, "2"],
  rate: Float[Array, ""] | float,
  nodes: int,
  depth: int,
) -> Tree:
  """The tree of the `nodes - 1` likeliest continuations of `context`.

  A step to a token of weight w has probability w / (sum of weights + `rate`),
  `rate` standing for what is not in the table.  No continuation is likelier
  than its own beginning, which so is in the tree, too, and no level holds more
  than `nodes - 1`: the search is exact.

  Args:
    follow: `context i32[2] -> (tokens i32[C], weight f32[C])`, 0 for no token.
    context: the last two tokens; the second is the root.
    rate: 0 or above (dynamic).
    nodes: the root included (static).
    depth: of the deepest node (static).
  """
  wanted, levels, offset = nodes - 1, [], -1  # candidate -1 is the root
  score, contexts = jnp.zeros(1), context[None]
  for _ in range(depth):
    tokens, weight = jax.vmap(follow)(contexts)
    total = weight.sum(-1, keepdims=True) + rate
    odds = weight / jnp.where(total > 0, total, 1)
    log = (score[:, None] + jnp.log(odds)).reshape(-1)
    score, best = lax.top_k(log, min(wanted, log.size))
    parent, token = best // tokens.shape[1], tokens.reshape(-1)[best]
    levels.append((score, token, offset + parent))
    offset = sum(len(score) for score, _, _ in levels[:-1])
    contexts = jnp.stack([contexts[parent, 1], token], 1)
  score, token, parent = map(jnp.concatenate, zip(*levels))
  score, best = lax.top_k(score, min(wanted, len(score)))  # ties: parents first
  node = jnp.zeros(len(token) + 1, jnp.int32)  # of each candidate; [-1] is 0
  node = node.at[best].set(1 + jnp.arange(len(best)))
  parent = jnp.where(score > -jnp.inf, node[parent[best]], ABSENT)
  around = (1, wanted - len(best))
  return Tree(
    jnp.pad(token[best], around).at[0].set(context[1]),
    jnp.pad(parent, around, constant_values=ABSENT).at[0].set(-1),
  )


def _home(context, slots: int):
  """The first slot of a context, on host and device alike."""
  a, b = (context[..., i].astype(np.uint32) for i in (0, 1))
  h = a * np.uint32(0x9E3779B1) ^ b * np.uint32(0x85EBCA6B)
  h = (h ^ (h >> 15)) * np.uint32(0x2C1B3C6D)
  return ((h ^ (h >> 13)) % slots).astype(np.int32)


def _place(context: np.ndarray) -> tuple[np.ndarray, int]:
  """A slot for each context within its probes, and how many slots it took."""
  slots = 16
  while True:
    slot, taken = np.full(len(context), -1), np.zeros(slots, bool)
    if slots >= 2 * len(context):
      for probe in range(PROBES):
        left = np.flatnonzero(slot < 0)
        wish = (_home(context[left], slots) + probe) % slots
        left, wish = left[~taken[wish]], wish[~taken[wish]]
        wish, first = np.unique(wish, return_index=True)
        slot[left[first]], taken[wish] = wish, True
      if (slot >= 0).all():
        return slot, slots
    slots *= 2
