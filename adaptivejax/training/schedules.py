# SPDX-License-Identifier: Apache-2.0
"""Budget schedules: the target share of compute as a function of the step.

A model that must be cheap from its first step never learns what to spend on, so
a budget starts at the dense share, 1, and comes down:

    share(t) = end + (start - end) w(u),    u = clip((t - begin) / steps, 0, 1)

with w(u) = 1 - u (`linear`) or (1 + cos(pi u)) / 2 (`cosine`).  The step is
dynamic, everything else static.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Step = Int[Array, ""] | int
Schedule = Callable[[Step], Float[Array, ""]]


def constant(share: float) -> Schedule:
  """The same share of compute, in (0, 1], at every step."""
  _check(share=share)
  return lambda step: jnp.float32(share)


def linear(
  end: float, *, steps: int, start: float = 1.0, begin: int = 0
) -> Schedule:
  """From `start` at step `begin` to `end`, `steps` steps later, in a line."""
  _check(start=start, end=end)
  return _anneal(start, end, begin, steps, lambda u: 1 - u)


def cosine(
  end: float, *, steps: int, start: float = 1.0, begin: int = 0
) -> Schedule:
  """From `start` at step `begin` to `end`, `steps` steps later, smoothly."""
  _check(start=start, end=end)
  return _anneal(
    start, end, begin, steps, lambda u: (1 + jnp.cos(jnp.pi * u)) / 2
  )


def _anneal(start, end, begin, steps, weight) -> Schedule:
  if steps < 1 or begin < 0:
    raise ValueError(f"{steps=} must be at least 1 and {begin=} at least 0")

  def share(step):
    done = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / steps, 0, 1)
    return end + (start - end) * weight(done)

  return share


def _check(**shares: float) -> None:
  for name, share in shares.items():
    if not 0 < share <= 1:
      raise ValueError(f"{name}={share} must be a share of compute, in (0, 1]")
