# SPDX-License-Identifier: Apache-2.0
r"""NSA: summaries of all keys, the best few blocks, and a window, each gated.

Yuan et al., 2025, https://arxiv.org/abs/2502.11089

A query looks at the keys up to its own in three ways (eq. 5):

    o_t = sum_c g_t^c Attn(q_t, K_t^c, V_t^c),   c in {cmp, slc, win},

with gates g = sigmoid of a linear map of x_t, one for each head.  cmp: of l
keys, each d-th time, an MLP with their places makes one (eq. 7).  slc: the n
best of the blocks of l' keys, the first and the last two among them; p being
the softmax of cmp, block j is worth (eq. 9 and 10)

    sum_h sum_{m < l'/d} sum_{n < l/d} p^h[j l'/d + m - n],

counted from 0, over the heads h that share its keys.  win: the last w keys.

Primitive: `attend_blocks` for cmp; `attend_chosen` for the others, by tile, as
heads that share keys choose as one; the choice carries no gradient.
Departs: the views share keys and values, with positions applied, as published
in flash-linear-attention (in the paper each has its own).  A decoded token
makes l/d summaries anew, and reads all of the cache's (`nn.ByBlock`).
Axes: B batch, T tokens, D features, H query heads, G key heads, W head width,
N summaries, C keys of one, K blocks.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.chosen_blocks import (
  attend_chosen,
  attend_window,
  best_blocks,
  over_queries,
)
from adaptivejax.core.cost import flops
from adaptivejax.core.summaries import attend_summaries, block_worth
from adaptivejax.nn.attention import head_width
from adaptivejax.nn.by_block import ByBlock, Summary
from adaptivejax.nn.linear import linear
from adaptivejax.nn.look import Looked
from adaptivejax.nn.setting import Setting


class NSA(ByBlock):
  """A look with weights of its own, to be trained with its model.

  Args:
    features, heads, width: D, H and W, D / H if not given.
    size, stride: l and d, keys of a summary, and from one to the next (static).
    block, blocks: l' and n, keys of a block, and blocks chosen (static).
    window: w (static).
    hidden: width of the MLPs, 4 W if not given.
    rngs: for MLPs and gates.

  The `Setting` is the share of these blocks that is not used; three always are.
  """

  def __init__(
    self, features: int, heads: int, *, width: int | None = None,
    size: int = 32, stride: int = 16, block: int = 64, blocks: int = 16,
    window: int = 512, hidden: int | None = None, rngs: nnx.Rngs,
  ):  # fmt: skip
    width = head_width(features, heads, width)
    if min(stride, size, block) < 1 or size % stride or block % stride:
      raise ValueError(f"{stride=} must divide {size=} and {block=}.")
    if blocks < 3 or window < 1:
      raise ValueError(f"{blocks=} must be at least 3, {window=} at least 1.")
    super().__init__(size, stride)
    self.block, self.blocks, self.window = block, blocks, window
    self.key = Summary(size, width, hidden or 4 * width, rngs=rngs)
    self.value = Summary(size, width, hidden or 4 * width, rngs=rngs)
    self.gate = linear(features, 3 * heads, rngs=rngs, bias=True)
    self.level = Setting(jnp.zeros(()))

  def memory(self, batch, heads, slots, width, dtype):
    return (jnp.zeros((batch, heads, self.windows(slots), width), dtype),) * 2

  def summarise(self, k, v, there):
    del there
    return self.key(k), self.value(v)

  def find(self, q, keys: Keys, summaries, positions, slots, x) -> Looked:
    if x is None:
      raise ValueError("NSA makes its gates of `x`: pass what `q` is made of.")
    k, v = summaries
    ends = jnp.arange(k.shape[2]) * self.stride + self.size - 1
    summed = Keys(k, v, jnp.broadcast_to(ends, (len(q), 1, ends.size)))
    coarse, spent = attend_summaries(q, summed, slots)
    chosen, block = self.choose(q, keys, summed, slots), self.block
    fine, cost = attend_chosen(q, keys, chosen, positions, block=block)
    last, more = attend_window(q, keys, slots, positions, block, self.window)
    gates = self.gate(jnp.where(positions[..., None] >= 0, x, 0))
    gates = jax.nn.sigmoid(gates.reshape(*q.shape[:3], 3))
    out = jnp.stack([coarse, fine, last], -1) * gates[..., None, :]
    asked = flops(self.gate, x) + 2.0 * q.size * ends.size  # scores, again
    spent = (spent + cost + more).with_overhead(asked)
    cost = cost._replace(spent=spent.spent, bound=spent.bound)
    return Looked(out.sum(-1), cost)

  def choose(self, q, keys, summed, slots) -> Int[Array, "B G T K"]:
    """The blocks of each query, those that it must see first, -1 for none."""
    count = -(-keys.k.shape[2] // self.block)
    left = jnp.round(self.blocks * (1 - self.level.get_value()))
    sizes = {"block": self.block, "size": self.size, "stride": self.stride}
    each, summed = jnp.arange(count), lax.stop_gradient(summed)

    def some(q, slots):
      own = (slots // self.block)[:, None, :, None]
      worth = block_worth(q, summed, slots, count, **sizes)
      worth = jnp.where((each == 0) | (each >= own - 1), jnp.inf, worth)
      worth = jnp.where(each <= own, worth, -jnp.inf)
      return best_blocks(worth, self.blocks, jnp.maximum(left, 3))

    return over_queries(some, (lax.stop_gradient(q), slots))
