# SPDX-License-Identifier: Apache-2.0
"""The shapes that tests, benchmarks and tuning share."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_attention.types import BlockLists, Rule


@dataclasses.dataclass(frozen=True)
class Spec:
  """Self-attention of a sequence over lists drawn at random.

  Attributes:
    name: what it stands for.
    tokens: queries, and keys.
    width: of a head.
    block_q, block_kv: of the lists.
    density: share of the blocks listed, besides those on the diagonal; lists of
      all that a causal rule shows if None.
    heads, key_heads: of queries and of keys.
  """

  name: str
  tokens: int
  width: int
  block_q: int
  block_kv: int
  density: float | None = 0.25
  heads: int = 1
  key_heads: int = 1

  @property
  def rule(self) -> Rule:
    return Rule(causal=self.density is None)

  def mask(self) -> np.ndarray:
    """The listed blocks, bool[Q, K]."""
    tiles, blocks = self.tokens // self.block_q, self.tokens // self.block_kv
    first = np.arange(tiles)[:, None] * self.block_q
    start = np.arange(blocks) * self.block_kv
    if self.density is None:
      return start < first + self.block_q
    chosen = np.random.default_rng(0).random((tiles, blocks)) < self.density
    return chosen | (start == first // self.block_kv * self.block_kv)

  def lists(self) -> BlockLists:
    """Of the mask, one for all heads."""
    mask = self.mask()
    count = mask.sum(-1)
    index = np.argsort(~mask, axis=-1, kind="stable")[:, : count.max()]
    return BlockLists(
      jnp.asarray(index, jnp.int32)[None, None],
      jnp.asarray(count, jnp.int32)[None, None],
      None,
      self.block_q,
      self.block_kv,
    )

  @property
  def squares(self) -> float:
    """Listed pairs, in blocks of 128 x 128."""
    return self.mask().sum() * self.block_q * self.block_kv / 128**2


COARSE = Spec("coarse", 4096, 128, 512, 512)
"""Blocks of 512: bound by the matrix units."""

FINE = Spec("fine", 4096, 128, 128, 128)
"""Blocks of 128, as methods choose them: bound by latency."""

SHARED = Spec("shared", 4096, 128, 512, 128)
"""Key blocks of 128, chosen for 512 queries together."""

DENSE = Spec("dense", 4096, 128, 512, 512, density=None)
"""All that a causal rule shows: what sparsity must not make slower."""

LONG = Spec("long", 131_072, 128, 128, 128, 1 / 64, heads=8, key_heads=2)
"""For the compiler: lists of tens of blocks among a thousand."""
