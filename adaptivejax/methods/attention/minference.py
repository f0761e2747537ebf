# SPDX-License-Identifier: Apache-2.0
r"""MInference: each head reads a prompt by a pattern found offline.

Jiang et al., 2024, https://arxiv.org/abs/2407.02490

Three patterns (sec. 3): *a_shape*, the first keys and the last ones;
*vertical_slash*, the columns and slashes at which the last 64 queries look most
(alg. 2); *block_sparse*, the blocks whose mean keys score best for the mean
query of a tile (alg. 3).  `assign` finds the one that keeps most, by head.

Primitive: `line_mass`, `slash_blocks`, `pooled_scores`, `attend_columns`.
Departs: columns are gathered in a second pass, merged exactly; first keys that
are whole blocks are blocks.  block_sparse also sees the first block and its
own, or some queries might see nothing.
`assign` takes budgets as given; the paper first makes them cost the same, the
published code then turns all patterns into vertical_slash.  1024 and 4096 are
of sec. 4, other budgets those of that code.  The last queries choose for all.
Axes: B batch, T queries, S keys, H query heads, L layers.
"""

from dataclasses import astuple, dataclass

import jax.numpy as jnp
import numpy as np

from adaptivejax.core.attention import Keys, attention_weights
from adaptivejax.core.block_masks import visible_blocks
from adaptivejax.core.block_scores import (
  end_blocks,
  last_queries,
  line_mass,
  pooled_scores,
  slash_blocks,
  tokens_before,
)
from adaptivejax.core.select import top_k
from adaptivejax.nn.sparse_prefill import Chosen, SparsePrefill, coverage_of

PATTERNS = ("a_shape", "vertical_slash", "block_sparse")


@dataclass(frozen=True)
class Budgets:
  """How much the patterns look at, in tokens but for `blocks`."""

  sinks: int = 1024  # first keys of a_shape
  window: int = 4096  # last keys of a_shape
  verticals: int = 1000  # columns of vertical_slash, and
  first: int = 30  # of these, first keys that stay
  slashes: int = 6096  # offsets of vertical_slash, and
  recent: int = 100  # of these, least ones that stay
  blocks: int = 100  # of a tile of block_sparse
  probe: int = 64  # last queries, which choose columns and slashes


class MInference(SparsePrefill):
  """A look of a pattern for each head; see `nn.with_look`.

  `patterns`: a name for each head, or a tuple of such tuples, one a layer; like
  `budgets` static.  `level`, the `Setting`, is the share of these not used.
  """

  def __init__(self, patterns, budgets=Budgets(), *, block_q=64, block_kv=64):
    table = [patterns] if isinstance(patterns[0], str) else patterns
    if bad := {name for row in table for name in row} - {*PATTERNS}:
      raise ValueError(f"patterns are {PATTERNS}; got {sorted(bad)}.")
    if min(astuple(budgets)) < 1 or len({len(row) for row in table}) > 1:
      raise ValueError(f"{budgets} must be at least 1, {table} of one length.")
    super().__init__(block_q=block_q, block_kv=block_kv)
    self.room = max(budgets.sinks, budgets.verticals, budgets.first)
    self.budgets, self.patterns = budgets, tuple(map(tuple, table))

  def choose(self, q, keys: Keys, positions, layer=0) -> Chosen:
    kinds = np.array([[*map(PATTERNS.index, row)] for row in self.patterns])
    if q.shape[2] != kinds.shape[1]:
      raise ValueError(f"{kinds.shape[1]} patterns for {q.shape[2]} heads.")
    kind = jnp.asarray(kinds)[layer if len(kinds) > 1 else 0][None, :, None]
    mask = columns = jnp.zeros((), bool)
    for number in sorted(set(kinds.flat)):
      here = getattr(self, PATTERNS[number])(q, keys, positions)
      mask |= (kind == number)[..., None] & here.mask
      columns |= (kind == number) & here.columns
    lone = bool(self.budgets.sinks % self.block_kv)  # keys of a_shape
    gathers = lone if PATTERNS.index("a_shape") in kinds else False
    gathers |= PATTERNS.index("vertical_slash") in kinds
    return Chosen(mask, columns if gathers else None)

  def a_shape(self, q, keys, positions) -> Chosen:
    near = jnp.arange(keys.pos.shape[-1]) < self.left(self.budgets.window)
    near = jnp.broadcast_to(near, keys.pos.shape)
    mask = slash_blocks(near, positions, keys, **self.blocks)
    first = tokens_before(keys) < self.left(self.budgets.sinks)
    if self.budgets.sinks % self.block_kv:
      return Chosen(mask, first)
    place = jnp.where(first, keys.pos, -1)
    mask |= visible_blocks(positions, place, **self.blocks)
    return Chosen(mask, jnp.zeros_like(first))

  def vertical_slash(self, q, keys, positions) -> Chosen:
    first, recent = self.budgets.first, self.budgets.recent
    probe, at = last_queries(q, positions, self.budgets.probe)
    columns, slashes = line_mass(attention_weights(probe, keys, at), at, keys)
    columns = jnp.where(tokens_before(keys) < first, jnp.inf, columns)
    slashes = slashes.at[..., :recent].set(jnp.inf)
    slashes = top_k(slashes, self.left(self.budgets.slashes, recent))
    mask = slash_blocks(slashes, positions, keys, **self.blocks)
    columns = top_k(columns, self.left(self.budgets.verticals, first))
    return Chosen(mask, columns & (keys.pos >= 0))

  def block_sparse(self, q, keys, positions) -> Chosen:
    scores = pooled_scores(q, keys, positions, **self.blocks)
    seen = visible_blocks(positions, keys.pos, **self.blocks)
    scores = jnp.where(seen, scores, -jnp.inf)
    mask = seen & top_k(scores, self.left(self.budgets.blocks))
    mask |= end_blocks(positions, keys, **self.blocks)
    return Chosen(mask, jnp.zeros_like(keys.pos, bool))


def assign(model, tokens, look: MInference, since: int = 0, among=PATTERNS):
  """The patterns that keep most attention on a prompt, L tuples of H names.

  Runs `model(tokens i32[B, T], cache)`, with the budgets of `look`; queries
  from position `since` (static) on count, 2500 in the published code; `among`
  are the patterns to choose from, in order: of equals, the first.
  """
  heads = len(look.patterns[0])
  one = lambda name: MInference((name,) * heads, look.budgets, **look.blocks)
  kept, _ = coverage_of(model, tokens, [*map(one, among)], heads, since)
  best = np.asarray(kept).argmax(-1)
  return tuple(tuple(among[i] for i in row) for row in best)
