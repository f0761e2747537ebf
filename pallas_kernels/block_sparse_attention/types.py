# SPDX-License-Identifier: Apache-2.0
"""What block-sparse attention is told besides queries, keys and values.

Axes: B batch, H query heads, G key heads, T queries, S keys, D head width,
L heads that own a list (1, G or H), Q query tiles, K key blocks, C entries of
a list, P key heads that own marks (1 or G).
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

NEVER = -1e30
"""Score of an invisible key; finite, so that an empty row stays finite."""


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("index", "count", "rows"),
  meta_fields=("block_q", "block_kv"),
)
@dataclass(frozen=True)
class BlockLists:
  """Which key blocks each query tile looks at; what they are is data.

  An entry past `count` is ignored, whatever it is; no block is listed twice.
  Lists may name more than is visible: `Marks` and `Rule` decide the pairs.

  Attributes:
    index: key blocks of each tile, ascending, i32[B, L, Q, C]; B may be 1.
    count: entries of each list, i32[B, L, Q].
    rows: which rows of the tile look at each entry, bool[B, L, Q, C, block_q];
      all if None.
    block_q: queries in a tile (static); the last one may be cut off.
    block_kv: keys in a block (static); the last one may be cut off.
  """

  index: Any  # of arrays, but JAX also unflattens with what is none
  count: Any
  rows: Any = None
  block_q: int = 128
  block_kv: int = 128


class Marks(NamedTuple):
  """What queries and keys carry besides their vectors; all dynamic.

  Attributes:
    q_pos: positions of the queries, i32[B, T], -1 for none; 0..T-1 if None.
    kv_pos: positions of the keys, i32[B, P, S], -1 for none; 0..S-1 if None.
    q_segment: i32[B, T]; given with `kv_segment`, pairs must agree.
    kv_segment: i32[B, S].
    kv_bias: added to the scores of a key, f32[B, P, S]; the log of its size
      where a key stands for several.
    sinks: score of a key of value 0 that every query sees, f32[H].
  """

  q_pos: jax.Array | None = None
  kv_pos: jax.Array | None = None
  q_segment: jax.Array | None = None
  kv_segment: jax.Array | None = None
  kv_bias: jax.Array | None = None
  sinks: jax.Array | None = None


@dataclass(frozen=True)
class Rule:
  """How scores are made and which pairs are visible by position; static.

  Attributes:
    causal: a query sees keys up to its own position.
    window: and only the last so many, its own included; all if None.
    scale: of the products; 1 / sqrt(D) if None.
    softcap: scores s become softcap * tanh(s / softcap); not if None.
  """

  causal: bool = True
  window: int | None = None
  scale: float | None = None
  softcap: float | None = None


class Attended(NamedTuple):
  """What block-sparse attention returns.

  Attributes:
    out: [B, H, T, D]; 0 for a query that sees no key.
    lse: log of the sum of exp of its scores (sink included), f32[B, H, T];
      -inf for a query that sees nothing.
    mass: attention that each listed block got, summed over the tile's queries,
      f32[B, H, Q, C]; None if not asked for.  It carries no gradient.
  """

  out: jax.Array
  lse: jax.Array
  mass: jax.Array | None = None


UNMARKED = Marks()
CAUSAL = Rule()
