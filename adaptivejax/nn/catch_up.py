# SPDX-License-Identifier: Apache-2.0
"""A model reads what it missed of a text, in chunks of static size.

Axes: B batch, S slots, V vocabulary, C tokens of a chunk.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import Cost, bound_of, times
from adaptivejax.core.plans import run_times
from adaptivejax.nn.stack import present

PRESENT = Partial(present)


def catch_up(
  model: Any,
  cache: KVCache,
  text: Int[Array, "B S"],
  length: Int[Array, " B"],
  asked: Bool[Array, " B"],
  logits: Float[Array, "B V"],
  *,
  chunks: tuple[int, ...],
) -> tuple[KVCache, Array, Cost]:
  """Reads on to `length` in the rows that are asked.

  Args:
    model: a `DecoderLM`.
    cache: its own; the length of it is what it has read.
    text: the tokens, of which `length` are there.
    length: see there.
    asked: rows to read (dynamic).
    logits: of the rows that are not asked.
    chunks: sizes C to read in, rising from 1 (static): as many of the largest
      as fit, then one of the smallest that holds the rest.

  Returns:
    `(cache, logits, cost)`, the logits after the last token read.
  """
  slots = text.shape[1]
  sizes = [size for size in chunks if size <= slots]
  missed = jnp.where(asked, length - cache.length, 0).max()
  most = sizes[-1]
  rung = jnp.searchsorted(jnp.array([0, *sizes]), missed % most)

  def read(carry, asked, length, text, model, size):
    cache, logits, cost = carry
    count = jnp.clip(jnp.where(asked, length - cache.length, 0), 0, size)
    at = jnp.minimum(cache.positions(size), slots - 1)
    tokens = jnp.take_along_axis(text, at, axis=1)
    newest = jnp.maximum(count - 1, 0)
    out = model(tokens, cache, lengths=count, read_at=newest, stack=PRESENT)
    logits = jnp.where((count > 0)[:, None], out.logits[:, 0], logits)
    return out.cache, logits, cost + out.cost

  def once(cache, logits):
    carry = cache, logits, Cost.zero()
    return read(carry, asked, length, text, model, most)[2]

  carry = cache, logits, Cost.zero()
  for n, size in reversed(list(enumerate(sizes, 1))):
    rounds = (rung == n) + (missed // most if size == most else 0)
    some = functools.partial(read, size=size)
    carry = run_times(rounds, some, carry, asked, length, text, model)
  cache, logits, cost = carry
  bound = times(bound_of(once, cache, logits), slots // most + 1)
  return cache, logits, cost._replace(bound=jnp.float32(bound))
