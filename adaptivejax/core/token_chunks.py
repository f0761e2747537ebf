# SPDX-License-Identifier: Apache-2.0
"""Long sequences, some tokens at a time, so that less exists at once.

Axes: B batch, T tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from adaptivejax.core.varying import vary, varying_axes


def chunk_sizes(tokens: int, chunk: int) -> tuple[int, int]:
  """Number and size of the fewest chunks, equal and at most `chunk`; static."""
  count = max(-(-tokens // chunk), 1)
  return count, -(-tokens // count)


def scan_chunks(
  f: Callable[[Any, tuple[Array, ...]], tuple[Any, Array]],
  carry: Any,
  arrays: Sequence[Array],
  axes: Sequence[int],
  fills: Sequence[float],
  chunk: int,
) -> tuple[Any, Array]:
  """`f` over the chunks of a sequence, one after the other.

  Args:
    f: `(carry, arrays of a chunk) -> (carry, out)`, out being [B, T, ...].
    carry: what goes from chunk to chunk.
    arrays: of T tokens each.
    axes: where each has its tokens (static).
    fills: what each has where the last chunk goes beyond the end (static).
    chunk: tokens at most (static).

  Returns:
    The last carry, and `out` of all tokens.
  """
  tokens = arrays[0].shape[axes[0]]
  count, size = chunk_sizes(tokens, chunk)
  if count == 1:
    return f(carry, tuple(arrays))

  def cut(a, axis, fill):
    spare = [(0, 0)] * a.ndim
    spare[axis] = 0, count * size - tokens
    a = jnp.pad(a, spare, constant_values=fill)
    shape = *a.shape[:axis], count, size, *a.shape[axis + 1 :]
    return jnp.moveaxis(a.reshape(shape), axis, 0)

  carry = vary(carry, varying_axes(carry, arrays))
  carry, out = lax.scan(f, carry, tuple(map(cut, arrays, axes, fills)))

  def join(a):
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(len(a), count * size, *a.shape[3:])[:, :tokens]

  return carry, jax.tree.map(join, out)
