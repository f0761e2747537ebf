# SPDX-License-Identifier: Apache-2.0
r"""MInference: each head reads a prompt by a pattern found offline.

Jiang et al., 2024, https://arxiv.org/abs/2407.02490

Three patterns (sec. 3): *a_shape*, the first keys and the last ones;
*vertical_slash*, the columns and the slashes at which the last 64 queries look
most, the first columns and the nearest slashes in any case (alg. 2);
*block_sparse*, the blocks whose mean keys score best for the mean query of a
tile (alg. 3).  `assign` finds the pattern of each head: on a prompt, the one
that keeps most of the true attention.

Primitive: `line_mass`, `slash_blocks`, `pooled_scores`, `attend_columns`.
Departs: columns are gathered in a second pass, merged exactly.  Every tile of
block_sparse also sees the first block and its own, or its first queries might
see nothing.  `assign` compares patterns of given budgets, where the paper first
makes these cost the same on its kernels, and where the published code turns the
other patterns into vertical_slash.  Budgets are those of the published code;
1024 + 4096 of a_shape are unverified.  The choice of all tiles depends on the
last queries.
Axes: B batch, T queries, S keys, H query heads, L layers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.core.attention import Keys, attention_weights
from adaptivejax.core.block_lists import visible_blocks
from adaptivejax.core.block_scores import (
  end_blocks,
  last_queries,
  line_mass,
  pooled_scores,
  slash_blocks,
)
from adaptivejax.core.select import top_k
from adaptivejax.nn.setting import Setting
from adaptivejax.nn.sparse_prefill import Chosen, SparsePrefill, coverage_of

PATTERNS = ("a_shape", "vertical_slash", "block_sparse")


class MInference(SparsePrefill):
  """A look of a pattern for each head; see `nn.with_look`.

  All static, sizes in tokens but for `blocks`:

  Args:
    patterns: a name for each head, or a tuple of such tuples, one a layer.
    sinks, window: first and last keys of a_shape.
    verticals, slashes: columns and offsets of vertical_slash.
    first, recent: of these, the first keys and least offsets that are forced.
    blocks: key blocks that a tile of block_sparse looks at.
    probe: last queries that choose columns and slashes.
    block_q, block_kv: queries of a tile, keys of a block.

  `level`, the `Setting`, is the share of the budgets that is not used; what is
  forced stays, and one key, offset and block of each.
  """

  def __init__(
    self, patterns, *, sinks: int = 1024, window: int = 4096,
    verticals: int = 1000, slashes: int = 6096, first: int = 30,
    recent: int = 100, blocks: int = 100, probe: int = 64, block_q: int = 64,
    block_kv: int = 64,
  ):  # fmt: skip
    patterns = tuple(patterns)
    table = (patterns,) if isinstance(patterns[0], str) else patterns
    if bad := {name for row in table for name in row} - set(PATTERNS):
      raise ValueError(f"patterns are {PATTERNS}; got {sorted(bad)}.")
    if len({len(row) for row in table}) > 1:
      raise ValueError("`patterns` must name as many heads in every layer.")
    sizes = sinks, window, verticals, slashes, first, recent, blocks, probe
    if min(sizes) < 1:
      raise ValueError(f"budgets must be at least 1; got {min(sizes)}.")
    room = max(sinks, verticals, first)
    super().__init__(block_q=block_q, block_kv=block_kv, room=room)
    self.patterns, self.sizes = tuple(map(tuple, table)), sizes
    self.level = Setting(jnp.zeros(()))

  def choose(self, q, keys: Keys, positions, layer=0) -> Chosen:
    table = np.array(
      [[PATTERNS.index(p) for p in row] for row in self.patterns]
    )
    if q.shape[2] != table.shape[1]:
      raise ValueError(f"{table.shape[1]} patterns for {q.shape[2]} heads.")
    kind = jnp.asarray(table)[layer if len(table) > 1 else 0][None, :, None]
    mask, columns = jnp.bool_(False), jnp.zeros((), bool)
    for number in sorted(set(table.flat)):
      chosen = getattr(self, PATTERNS[number])(q, keys, positions)
      mask |= (kind == number)[..., None] & chosen.mask
      if chosen.columns is not None:
        columns |= (kind == number) & chosen.columns
    return Chosen(mask, columns if columns.ndim else None)

  def left(self, size: int, least: int = 1):
    """What the level leaves of a budget, i32[]."""
    left = jnp.round(size * (1 - self.level.get_value()))
    return jnp.maximum(left, least).astype(jnp.int32)

  def a_shape(self, q, keys, positions) -> Chosen:
    sinks, window, *_ = self.sizes
    near = jnp.arange(keys.pos.shape[-1]) < self.left(window)
    near = jnp.broadcast_to(near, (len(q), 1, near.size))
    mask = slash_blocks(near, positions, keys, **self.blocks)
    return Chosen(mask, _age(keys) < self.left(sinks))

  def vertical_slash(self, q, keys, positions) -> Chosen:
    _, _, verticals, slashes, first, recent, _, probe = self.sizes
    asked, at = last_queries(q, positions, probe)
    weights = attention_weights(asked, keys, at)
    by_column, by_slash = line_mass(weights, at, keys)
    by_column = jnp.where(_age(keys) < first, jnp.inf, by_column)
    columns = top_k(by_column, self.left(verticals, first)) & (keys.pos >= 0)
    near = jnp.arange(by_slash.shape[-1]) < recent
    by_slash = jnp.where(near, jnp.inf, by_slash)
    chosen = top_k(by_slash, self.left(slashes, recent))
    mask = slash_blocks(chosen, positions, keys, **self.blocks)
    return Chosen(mask, columns)

  def block_sparse(self, q, keys, positions) -> Chosen:
    scores = pooled_scores(q, keys, positions, **self.blocks)
    seen = visible_blocks(positions, keys.pos, **self.blocks)
    best = top_k(jnp.where(seen, scores, -jnp.inf), self.left(self.sizes[6]))
    return Chosen(seen & best | end_blocks(positions, keys, **self.blocks))


def assign(
  model, tokens, look: MInference, since: int = 0
) -> tuple[tuple[str, ...], ...]:
  """The pattern of each layer and head that keeps most attention on a prompt.

  Args:
    model: trained; called as `model(tokens, cache)`.
    tokens: the prompt to calibrate on, i32[B, T].
    look: whose budgets and number of heads are used.
    since: queries from this position on count (static), 2500 in the paper's
      code: the first ones see little either way.
  """
  heads, candidates = len(look.patterns[0]), []
  for name in PATTERNS:
    candidates.append(jax.tree.map(lambda a: a, look))  # a copy
    candidates[-1].patterns = ((name,) * heads,)
  mass, _ = coverage_of(model, tokens, candidates, heads, since)
  best = np.asarray(mass).argmax(-1)  # of equals, the first
  return tuple(tuple(PATTERNS[i] for i in row) for row in best)


def _age(keys: Keys):
  """Tokens before each key, i32[B, 1, S]; of no key, more than there are."""
  none = jnp.iinfo(jnp.int32).max
  pos = jnp.where(keys.pos < 0, none, keys.pos)
  return jnp.where(keys.pos < 0, none, pos - pos.min(-1, keepdims=True))
