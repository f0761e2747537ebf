# SPDX-License-Identifier: Apache-2.0
"""How fast the pairs of features of a head turn with position.

Feature pair i of a head of width W turns by base^(-2 i / W) per position (Su et
al., 2021, https://arxiv.org/abs/2104.09864, sec. 3.2).  A model that was taught
longer texts later turns slower: all pairs by a factor (Chen et al., 2023,
https://arxiv.org/abs/2306.15595, eq. 4), or only the slow ones, those that turn
less than `low` times in a text of the old length, with a ramp up to `high`
turns (Llama 3.1; Grattafiori et al., 2024, https://arxiv.org/abs/2407.21783;
the formula is that of its published code).
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Ramp:
  """Which pairs keep their rate; all static."""

  low: float
  """Turns in the old length below which a pair is slowed down fully."""
  high: float
  """Turns above which it is not."""
  length: int
  """Tokens of the texts learned first."""

  def __post_init__(self):
    if not (0 < self.low < self.high and self.length > 0):
      raise ValueError(
        f"a ramp needs 0 < low < high turns in a length; got {self}."
      )


@dataclass(frozen=True)
class Rope:
  """Rotary positions of a model; all static."""

  base: float = 10_000.0
  """The slowest pair turns about once in 2 pi `base` positions."""
  factor: float = 1.0
  """How much slower pairs turn than `base` says."""
  ramp: Ramp | None = None
  """Which pairs `factor` is for; all if not given."""

  def __post_init__(self):
    if not (self.base > 0 and self.factor > 0):
      raise ValueError(f"base and factor must be positive; got {self}.")

  def rates(self, half: int) -> Float[np.ndarray, " {half}"]:
    """Radians per position of the `half` pairs of a head."""
    rate = self.base ** (-np.arange(half, dtype=np.float32) / half)
    if self.factor == 1:
      return rate
    if self.ramp is None:
      return rate / self.factor
    low, high = self.ramp.low, self.ramp.high
    turns = self.ramp.length * rate / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return rate * (kept + (1 - kept) / self.factor)

  def table(self, count: int, half: int) -> tuple[Array, Array]:
    """Cosines and sines at positions 0..count-1, f32[count, half], constants.

    For keys that are turned again at every step: to look up is cheaper.
    """
    angles = np.arange(count, dtype=np.float32)[:, None] * self.rates(half)
    return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))


USUAL = Rope()
"""Those of the paper."""
