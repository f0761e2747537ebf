# SPDX-License-Identifier: Apache-2.0
r"""FlexPrefill: each head of a prompt by blocks, or by columns and slashes.

Lai et al., 2025, https://arxiv.org/abs/2502.20766

The last queries of a prompt look at all keys: a. Their mean, and the mean key
of each block, guess the same: b = softmax(mean(q) . mean(k) / sqrt(D)).  With a
summed by block, a head whose guess is good,

    sqrt(JSD(a, b)) < tau,

trusts the guess (query-aware, alg. 4): over all its tiles, the fewest blocks
that hold a share gamma of the guessed attention.  Another takes the fewest
columns, and the fewest slashes, that each hold gamma of a (alg. 3).

Primitive: `line_mass`, `fewest_of_mass`, `attend_columns`.
Departs: columns are gathered, not rounded to blocks.  The published code counts
tokens that hold gamma, and takes a 128th as many blocks; here the tokens
themselves are taken.  `min_budget` is that of the published runs.  The choice
of all tiles depends on the last queries.
Axes: B batch, T queries, S keys, H query heads, M queries of the probe, Q query
tiles, K key blocks.
"""

import jax
import jax.numpy as jnp

from adaptivejax.core.attention import NEVER, Keys, attention_weights
from adaptivejax.core.block_masks import BLOCK, visible_blocks
from adaptivejax.core.block_scores import (
  end_blocks,
  fewest_of_mass,
  jensen_shannon,
  last_queries,
  line_mass,
  pooled_scores,
  slash_blocks,
)
from adaptivejax.core.select import top_k
from adaptivejax.nn.setting import Frozen, refuse_nan
from adaptivejax.nn.sparse_prefill import Chosen, SparsePrefill


class FlexPrefill(SparsePrefill):
  """A look that reads prompts head by head; see `nn.with_look`.

  Args:
    gamma: share of attention to hold.
    tau: distance up to which a head's guess is good; 0 trusts none, 1 each.
    min_budget: columns and slashes of a head at least, in tokens (static).
    block_q, block_kv: static; the probe is as long as a tile.

  `level`, the `Setting`, is 1 - gamma: 0 looks at all, 1 at the first block,
  the tile's own and `min_budget`.
  """

  def __init__(
    self,
    gamma: float = 0.9,
    tau: float = 0.1,
    *,
    min_budget: int = 1024,
    block_q: int = BLOCK,
    block_kv: int = BLOCK,
  ):
    refuse_nan(gamma=gamma, tau=tau)
    if min_budget < 0:
      raise ValueError(f"{min_budget=} must not be negative.")
    super().__init__(block_q=block_q, block_kv=block_kv, level=1 - gamma)
    self.min_budget = min_budget
    self.tau = Frozen(jnp.float32(tau))

  def choose(self, q, keys: Keys, positions, layer=0) -> Chosen:
    del layer
    gamma = self.share()
    probe, at = last_queries(q, positions, self.block_q)
    column_mass, slash_mass = line_mass(
      attention_weights(probe, keys, at), at, keys
    )
    aware = self.trusted(probe, at, keys, column_mass)[..., None]

    def lines(mass, allowed):
      least = top_k(mass, self.min_budget) & allowed
      return jnp.where(
        aware, least, fewest_of_mass(mass, gamma, least, allowed)
      )

    columns = lines(column_mass, keys.pos >= 0)
    slashes = lines(slash_mass, jnp.ones_like(keys.pos, bool))
    mask = slash_blocks(slashes, positions, keys, **self.blocks)
    seen = visible_blocks(positions, keys.pos, **self.blocks)
    ends = end_blocks(positions, keys, **self.blocks)
    guess = _attention(pooled_scores(q, keys, positions, **self.blocks), seen)
    flat = lambda a: jnp.broadcast_to(a, guess.shape).reshape(
      *aware.shape[:2], -1
    )
    best = fewest_of_mass(flat(guess), gamma, flat(ends), flat(seen))
    mask |= ends | (aware[..., None] & best.reshape(guess.shape))
    return Chosen(mask, columns)

  def trusted(self, probe, at, keys: Keys, column_mass):
    """Whether the mean query of the probe guesses its attention, bool[B, H]."""
    size = {"block_q": probe.shape[1], "block_kv": self.block_kv}
    scores = pooled_scores(probe, keys, at, **size)
    guess = _attention(scores, visible_blocks(at, keys.pos, **size))[:, :, 0]
    spare = -column_mass.shape[-1] % self.block_kv
    true = jnp.pad(column_mass, ((0, 0), (0, 0), (0, spare)))
    true = true.reshape(*guess.shape, self.block_kv).sum(-1)
    return jensen_shannon(true, guess) < self.tau.get_value()


def _attention(scores, seen):
  """Softmax over the blocks that are seen; 0 elsewhere."""
  weights = jax.nn.softmax(jnp.where(seen, scores, NEVER), axis=-1)
  return jnp.where(seen, weights, 0)
