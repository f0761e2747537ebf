# SPDX-License-Identifier: Apache-2.0
r"""XAttention: blocks of a prompt by the sums of their antidiagonals.

Xu et al., 2025, https://arxiv.org/abs/2503.16428

Of s neighbouring queries i and keys j, with i = s u + s - 1 - t, j = s n + t,

    A_un = sum_t q_i . k_j / (s sqrt(D)),        P = softmax_n A  (alg. 1),

which meets each query and each key once.  A tile of queries looks at the fewest
blocks that hold a share p of what P gives its rows, and always at the first
block and at its own.

Primitive: `antidiagonal_mass`, `fewest_of_mass`, `attend_blocks`.
Departs: one p for all heads; the paper also finds one for each, offline.
Positions, not places, decide what is visible, so it goes with padding and a
cache.  Queries of a tile choose together; a later tile has no part in it.  With
s even an antidiagonal crosses slashes of odd offset only: a lone one of even
offset is missed, though the paper says that every slash is seen.
Axes: B batch, T queries, S keys, H query heads, Q query tiles, K key blocks.
"""

from adaptivejax.core.attention import Keys
from adaptivejax.core.block_masks import BLOCK, visible_blocks
from adaptivejax.core.block_scores import (
  antidiagonal_mass,
  end_blocks,
  fewest_of_mass,
)
from adaptivejax.nn.setting import refuse_nan
from adaptivejax.nn.sparse_prefill import Chosen, SparsePrefill


class XAttention(SparsePrefill):
  """A look that reads prompts by antidiagonals; see `nn.with_look`.

  Args:
    threshold: p, 0.9 in most of the published settings.
    stride: s, 8 or 16, which divides the blocks (static).
    block_q, block_kv: static.

  `level`, the `Setting`, is the share of attention that is given up, 1 - p: 0
  looks at all, 1 at the first block and the tile's own.
  """

  def __init__(
    self,
    threshold: float = 0.9,
    *,
    stride: int = 8,
    block_q: int = BLOCK,
    block_kv: int = BLOCK,
  ):
    refuse_nan(threshold=threshold)
    if stride < 1 or block_q % stride or block_kv % stride:
      raise ValueError(f"{stride=} must divide {block_q=} and {block_kv=}.")
    super().__init__(block_q=block_q, block_kv=block_kv, level=1 - threshold)
    self.stride = stride

  def choose(self, q, keys: Keys, positions, layer=0) -> Chosen:
    del layer
    mass = antidiagonal_mass(
      q, keys, positions, stride=self.stride, **self.blocks
    )
    forced = end_blocks(positions, keys, **self.blocks)
    allowed = visible_blocks(positions, keys.pos, **self.blocks)
    return Chosen(fewest_of_mass(mass, self.share(), forced, allowed))
