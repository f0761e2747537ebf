# SPDX-License-Identifier: Apache-2.0
"""Work on the first few of T slots, as many as any row of the batch has filled.

Where tokens see one another, `bucketed`, whose rows are independent, does not
do: the whole array must get shorter.  The live slots of a row are its first;
the work runs on the first C of all rows, C being the smallest of a few static
rungs that holds the longest row.

Axes: B batch, T slots, C slots of a rung.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from adaptivejax.core.batching import looped
from adaptivejax.core.varying import vary, varying_axes

EIGHT = 8
"""Rungs there are by default, and what their lengths are multiples of."""


def default_rungs(slots: int) -> tuple[int, ...]:
  """Eighths of `slots`, rounded up to multiples of 8, ascending to `slots`."""
  parts = {-(-slots * i // (EIGHT * EIGHT)) * EIGHT for i in range(1, EIGHT)}
  return (*sorted(part for part in parts if part < slots), slots)


def on_rung(
  f: Callable[..., tuple[Any, Any]],
  x: Any,
  count: Int[Array, " B"],
  *operands: Any,
  rungs: tuple[int, ...] | None = None,
) -> tuple[Any, Any]:
  """`f` on the slots that are filled, or a few more.

  Args:
    f: `f(x, *operands) -> (y, rest)`, traced once per rung; the leaves of `y`
      are [B, C, ...] like those of `x`, those of `rest` do not depend on C.
    x: pytree of [B, T, ...].
    count: filled slots of each row, the first (dynamic).
    operands: pytrees that `f` gets whole.
    rungs: ascending to T (static); `default_rungs(T)` if not given.

  Returns:
    `(y, rest)`; `y` is [B, T, ...], 0 behind the rung.

  One conditional, whose branches recompute their inside in the backward pass.
  Under `vmap` over `count` the examples go one by one.
  """
  slots = jax.tree.leaves(x)[0].shape[1]
  rungs = default_rungs(slots) if rungs is None else rungs
  if not rungs or list(rungs) != sorted(set(rungs)) or rungs[-1] != slots:
    raise ValueError(
      f"{rungs=} must ascend to the {slots} slots there are, as in"
      f" `default_rungs({slots})`."
    )
  moves = varying_axes(count, x, operands)
  count, x, operands = vary((count, x, operands), moves)

  def branch(length):
    @jax.checkpoint
    def run(x, *operands):
      y, rest = f(jax.tree.map(lambda a: a[:, :length], x), *operands)
      return vary((jax.tree.map(fill, y), rest), moves)

    return run

  def fill(a):
    spare = [(0, 0), (0, slots - a.shape[1]), *[(0, 0)] * (a.ndim - 2)]
    return jnp.pad(a, spare)

  def choose(count, x, *operands):
    steps = jnp.asarray(rungs[:-1], jnp.int32)
    index = (count.max() > steps).sum(dtype=jnp.int32)
    return lax.switch(index, [branch(c) for c in rungs], x, *operands)

  return looped(choose)(count, x, *operands)


def on_all(f, x, count, *operands, rungs=None) -> tuple[Any, Any]:
  """The dense twin of `on_rung`: runs on all slots."""
  del count, rungs
  return f(x, *operands)
