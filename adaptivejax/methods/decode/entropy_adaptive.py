# SPDX-License-Identifier: Apache-2.0
r"""Entropy adaptive decoding: the large model speaks where the text is hard.

Simonds, 2025, https://arxiv.org/abs/2502.06833

With H_t the entropy of the active model's distribution of token t, before any
temperature, and m its mean over the last w tokens,

    the large model speaks next if m > tau, else the small one,

but only after `dwell` tokens with the same one.  The small model reads every
token; the large one reads what it missed when it is asked, in one chunk, so its
cache is that of a model that has read everything.

Primitive: `EntropyRing`; `run_if` over a ladder of chunk sizes.
Departs: the small model reads on while the large one speaks (`signal` says
whose entropy counts).  The abstract gives no dwell: 10 is ours.  The first
token is the large model's if the prompt's end is hard.
Axes: B batch, P prompt tokens, S slots, C tokens of a chunk, V vocabulary.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import Cost, flops
from adaptivejax.core.halting import EntropyRing, entropy
from adaptivejax.core.plans import run_if
from adaptivejax.nn.policy import Policy, Step
from adaptivejax.nn.stack import layer_count, present

PRESENT = Partial(present)


class Memory(NamedTuple):
  """What each row remembers; B leads.

  Attributes:
    cache: of the large model; its length is what that model has read.
    text: prompt and tokens, i32[B, S].
    ring: entropies of the last tokens.
    large: whether the large model speaks next, bool[B].
    since: tokens since the last change, i32[B].
  """

  cache: KVCache
  text: Array
  ring: EntropyRing
  large: Array
  since: Array


def _static(default: Any) -> Any:
  return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntropyAdaptive(Policy):
  """Decodes with the model it is given, the small one, and with `large`."""

  large: Any
  """A `DecoderLM` of the same vocabulary."""
  threshold: Any
  """tau, in nats; -inf is always the large model, inf never (dynamic)."""
  dwell: Any = 10
  """The fewest tokens between two changes (dynamic)."""
  window: int = _static(5)
  """w, tokens that the mean is over (static)."""
  signal: Literal["active", "small"] = _static("active")
  """Whose entropy counts (static)."""
  chunks: tuple[int, ...] = _static((1, 8, 64))
  """Sizes to catch up in, ascending; whole texts besides (static)."""

  def check(self, model) -> None:
    if self.large.config.vocab != model.config.vocab:
      raise ValueError(
        f"the large model knows {self.large.config.vocab} tokens and the small"
        f" one {model.config.vocab}: they must share a vocabulary."
      )
    traced = isinstance(self.threshold, jax.core.Tracer)
    if not traced and np.isnan(np.asarray(self.threshold)):
      raise ValueError(
        "threshold=nan decides nothing: give an entropy in nats."
      )
    rising = list(self.chunks) == sorted(set(self.chunks))
    if self.window < 1 or not rising or min(self.chunks, default=1) < 1:
      raise ValueError(
        f"window={self.window} must be at least 1, and chunks={self.chunks}"
        " must rise from at least 1."
      )

  def start(self, model, prompt, lengths, slots, logits):
    del model
    batch, tokens = prompt.shape
    text = jnp.zeros((batch, slots), jnp.int32).at[:, :tokens].set(prompt)
    cache = self.large.empty_cache(batch, slots)
    hard = entropy(logits) > self.threshold
    cache, logits, _ = self._catch_up(cache, text, lengths, hard, logits)
    ring = EntropyRing.empty(batch, self.window).push(entropy(logits))
    since = jnp.zeros(batch, jnp.int32)
    memory = Memory(cache, text, ring, hard, since)
    return self._decide(memory), logits

  def step(self, model, last, cache, memory, draw, live) -> Step:
    at = cache.length
    out = model(last[:, None], cache, lengths=live.astype(jnp.int32))
    row = jnp.arange(last.shape[0])
    text = memory.text.at[row, at].set(last, mode="drop")
    small = out.logits[:, 0]
    asked = memory.large & live
    ours, logits, cost = self._catch_up(
      memory.cache, text, at + 1, asked, small
    )
    said = small if self.signal == "small" else logits
    ring = memory.ring.push(entropy(said), live)
    memory = Memory(ours, text, ring, memory.large, memory.since + live)
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    read = lambda token: self.large(
      token, self.large.empty_cache(1, cache.slots)
    )
    made = live.sum(dtype=jnp.float32)
    cost = out.cost + cost
    cost = cost._replace(full=flops(read, one) * made, items=made)
    depth = out.depth[:, 0] + jnp.where(asked, _depth(self.large), 0)
    return Step(
      draw.token(logits, at + 1)[:, None],
      live.astype(jnp.int32),
      out.cache,
      self._decide(memory),
      depth,
      cost,
      jnp.zeros_like(live),
    )

  def _decide(self, memory: Memory) -> Memory:
    wanted = memory.ring.mean() > self.threshold
    first = memory.ring.count == 1  # nothing was said before
    free = (memory.since >= self.dwell) | first
    large = jnp.where(free, wanted, memory.large)
    since = jnp.where(large != memory.large, 0, memory.since)
    return memory._replace(large=large, since=since)

  def _catch_up(self, cache, text, length, asked, logits):
    """The large model reads what it missed of the rows that ask for it.

    Returns:
      `(cache, logits, cost)`, its logits where it was asked.
    """
    slots = text.shape[1]
    missed = jnp.where(asked, length - cache.length, 0)
    sizes = [size for size in self.chunks if size < slots]
    rung = jnp.searchsorted(jnp.array([0, *sizes]), missed.max())

    def read(carry, missed, text, large, size):
      cache, logits, cost = carry
      at = jnp.minimum(cache.positions(size), slots - 1)
      tokens = jnp.take_along_axis(text, at, axis=1)
      out = large(tokens, cache, lengths=missed, stack=PRESENT)
      newest = jnp.maximum(missed - 1, 0)[:, None, None]
      said = jnp.take_along_axis(out.logits, newest, axis=1)[:, 0]
      logits = jnp.where((missed > 0)[:, None], said, logits)
      return out.cache, logits, cost + out.cost

    carry = cache, logits, Cost.zero()
    for n, size in enumerate([*sizes, slots], 1):
      some = functools.partial(read, size=size)
      carry = run_if(
        rung == n, some, carry, missed, text, self.large, reverse=False
      )
    return carry


def _depth(model) -> int:
  return layer_count(model.layers) * model.layers.depth
