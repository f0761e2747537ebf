# SPDX-License-Identifier: Apache-2.0
r"""MoBA: each query goes to its best few key blocks, as tokens go to experts.

Lu et al., 2025, https://arxiv.org/abs/2502.13189

Keys are cut into blocks of B.  Query q of head h in block c gives block i < c
the score

    s_i = q . mean(K_i)                                              (eq. 6)

and attends by one softmax, causally, to its own block and to the k - 1 others
of the highest score (eq. 2-5; ties go to the earlier block).  Later blocks are
never seen, not even in their mean.  No weights: a model may be trained with it,
go on with it, or leave it (sec. 3.3).

Primitive: `attend_chosen` by block, the choices sorted as those of experts, as
in the paper (alg. 1): each head chooses large blocks for itself, and the work
is that of the choices whatever they are (8192 tokens, 4 of 64 blocks at random:
7 % of all pairs, where unions over tiles of 128 take 51 %).  Decoding
reads the chosen blocks, and one mean for each block, kept in the cache
(`nn.ByBlock`).
Departs: a block's mean is that of the keys in it that are there.
Axes: B batch, T tokens, H query heads, G key heads, K blocks, W head width.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.chosen_blocks import (
  attend_chosen,
  best_blocks,
  over_queries,
)
from adaptivejax.core.summaries import exact_scores
from adaptivejax.nn.by_block import ByBlock
from adaptivejax.nn.look import Looked
from adaptivejax.nn.setting import Setting


class MoBA(ByBlock):
  """A look at the own block and the best of those before; see `nn.with_look`.

  Args:
    block: B, keys in a block (static).
    blocks: k, blocks that a query looks at, its own included (static).

  The `Setting` is the share of the others that is not used, 1 leaves the own
  block.
  """

  def __init__(self, block: int = 512, blocks: int = 3):
    if block < 1 or blocks < 1:
      raise ValueError(f"{block=} keys and {blocks=} must be at least 1.")
    super().__init__(block, block)
    self.blocks = blocks
    self.level = Setting(jnp.zeros(()))

  def memory(self, batch, heads, slots, width, dtype):
    del dtype
    shape = batch, heads, self.windows(slots), width
    return jnp.zeros(shape, jnp.float32)

  def summarise(self, k, v, there) -> Float[Array, "B G K W"]:
    """The mean of the keys that are there."""
    del v
    many = jnp.maximum(there.sum(-1), 1)[..., None]
    return k.astype(jnp.float32).sum(3) / many

  def find(self, q, keys: Keys, summaries, positions, slots, x=None) -> Looked:
    del x
    chosen = self.choose(q, summaries, slots)
    out, cost = attend_chosen(
      q, keys, chosen, positions, block=self.size, by="block"
    )
    asked = 2.0 * q.size * summaries.shape[2]
    return Looked(out, cost.with_overhead(asked))

  def choose(
    self,
    q: Float[Array, "B T H W"],
    means: Float[Array, "B G K W"],
    slots: Int[Array, "B T"],
  ) -> Int[Array, "B H T N"]:
    """The blocks of each query, its own first, -1 for none."""
    left = jnp.round((self.blocks - 1) * (1 - self.level.get_value()))
    means = lax.stop_gradient(means)
    each = jnp.arange(means.shape[2])

    def some(q, slots):
      own = (slots // self.size)[:, None, :, None]
      score = exact_scores(q, means)
      score = score.reshape(len(q), -1, *score.shape[3:])
      score = jnp.where(each < own, score, -jnp.inf)
      score = jnp.where(each == own, jnp.inf, score)
      return best_blocks(score, self.blocks, 1 + left)

    return over_queries(some, (lax.stop_gradient(q), slots))
