# SPDX-License-Identifier: Apache-2.0
"""The weights of the groups to come, on their way into VMEM.

Axes: K features in, N features out, E groups; tn width of a strip of columns,
D depth of the ring.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Scalar = Any
"""i32[] as an array, or an int where it is static."""


@dataclasses.dataclass(frozen=True)
class Ring:
  """A ring of D buffers, each for the weights of a group in a strip.

  The stream of *loads* is strips x visited groups x chunks of columns; it goes
  on from strip to strip, and stops at the end of a core's strips.  A *visit* is
  a group in a strip, counted likewise.
  """

  hbm: Any  # w, [E, K, N] or [E, N, K]
  vmem: Any  # [D, K, tn] or [D, tn, K]
  sems: Any  # [D, tn / chunk]
  started: Any  # i32[1] in SMEM: loads started so far
  order: Any
  begin: Any
  visits: Scalar  # groups visited in a strip
  core: Scalar
  strips: Scalar  # strips of this core
  chunk: int
  transposed: bool

  @property
  def chunks(self) -> int:
    """Loads per group and strip."""
    return self.sems.shape[1]

  def columns(self, ref: Any, lead: Scalar, start: Scalar, size: int) -> Any:
    """`ref[lead]` at columns `start .. start + size - 1` of w."""
    at = pl.ds(pl.multiple_of(start, self.chunk), size)
    return ref.at[lead, at, :] if self.transposed else ref.at[lead, :, at]

  def copy(self, load: Scalar) -> Any:
    """The transfer number `load`."""
    visit = lax.div(load, self.chunks)
    chunk = load - visit * self.chunks
    strip = lax.div(visit, self.visits)
    group = self.order[visit - strip * self.visits]
    slot = lax.rem(visit, self.vmem.shape[0])
    strip += self.core * self.strips
    here = chunk * self.chunk
    there = strip * (self.chunks * self.chunk) + here
    return pltpu.make_async_copy(
      self.columns(self.hbm, group, there, self.chunk),
      self.columns(self.vmem, slot, here, self.chunk),
      self.sems.at[slot, chunk],
    )

  def wait(self, visit: Scalar) -> None:
    """Waits for all weights of a visit."""
    for n in range(self.chunks):
      self.copy(visit * self.chunks + n).wait()

  def loaded(self, visit: Scalar, start: Scalar, size: int) -> jax.Array:
    """Columns of the weights of a visit, [K, size] or [size, K]."""
    slot = lax.rem(visit, self.vmem.shape[0])
    return self.columns(self.vmem, slot, start, size)[...]

  def start(self, goal: Scalar) -> None:
    """Starts the loads before `goal` that have not started."""
    lax.fori_loop(
      self.started[0], goal, lambda n, _: self.copy(n).start(), None
    )
    self.started[0] = jnp.maximum(goal, self.started[0])

  def advance(self, visit: Scalar, step: Scalar, items: Scalar):
    """Keeps the ring filled at step `step`, of `items` in each strip."""
    depth, last = self.vmem.shape[0], self.strips * self.visits - 1
    goal = jnp.minimum((visit + 1) * self.chunks, (last + 1) * self.chunks)
    done = self.started[0]
    for ahead in range(1, depth):
      then = jnp.clip(visit + ahead, 0, jnp.maximum(last, 0))
      strip = lax.div(then, jnp.maximum(self.visits, 1))
      first = strip * items + self.begin[then - strip * self.visits]
      left = jnp.maximum(first - step - 1, 1)
      missing = (then + 1) * self.chunks - done
      goal = jnp.maximum(goal, done + lax.div(missing + left - 1, left))
    most = jnp.minimum(visit + depth, last + 1) * self.chunks
    self.start(jnp.minimum(goal, most))
