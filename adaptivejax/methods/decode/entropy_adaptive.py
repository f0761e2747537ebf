# SPDX-License-Identifier: Apache-2.0
r"""Entropy adaptive decoding: the large model speaks where the text is hard.

Simonds, 2025, https://arxiv.org/abs/2502.06833

With H_t the entropy of the active model's distribution of token t, before any
temperature, and m its mean over the last w tokens,

    the large model speaks next if m > tau, else the small one,

but only after `dwell` tokens with the same one.  The small model reads every
token; the large one reads what it missed when it is asked, in one chunk, so its
cache is that of a model that has read everything.

Primitive: `EntropyRing`; `nn.catch_up`, a ladder of chunk sizes.
Departs: the small model reads on while the large one speaks (`signal` says
whose entropy counts).  Entropy is in nats, not bits.  The abstract gives no
dwell: 10 is ours.  The first token is the large model's if the prompt's end is
hard.  What the large model reads of the prompt in the first step counts there.
Axes: B batch, P prompt tokens, S slots, C tokens of a chunk, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import flops
from adaptivejax.core.halting import EntropyRing, entropy
from adaptivejax.nn.catch_up import catch_up
from adaptivejax.nn.looks import refuse_alone
from adaptivejax.nn.policy import Policy, Step, static
from adaptivejax.nn.stack import layer_count


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
  window: int = static(5)
  """w, tokens that the mean is over (static)."""
  signal: str = static("active")
  """Whose entropy counts, "active" or "small" (static)."""
  chunks: tuple[int, ...] = static((1, 8, 64))
  """Sizes to catch up in, ascending, from 1 on (static)."""

  def check(self, model) -> None:
    if self.large.config.vocab != model.config.vocab:
      raise ValueError(
        f"the large model knows {self.large.config.vocab} tokens and the small"
        f" one {model.config.vocab}: they must share a vocabulary."
      )
    refuse_alone(self.large, "the large model, catching up,")
    traced = isinstance(self.threshold, jax.core.Tracer)
    if not traced and np.isnan(np.asarray(self.threshold)):
      raise ValueError(
        "threshold=nan decides nothing: give an entropy in nats."
      )
    rising = list(self.chunks) == sorted(set(self.chunks))
    if self.window < 1 or not rising or self.chunks[:1] != (1,):
      raise ValueError(
        f"window={self.window} must be at least 1, and chunks={self.chunks}"
        " must rise from 1."
      )
    if self.signal not in ("active", "small"):
      raise ValueError(f"signal={self.signal!r} must be active or small.")

  def start(self, model, prompt, lengths, slots, logits):
    del model
    batch, tokens = prompt.shape
    text = jnp.zeros((batch, slots), jnp.int32).at[:, :tokens].set(prompt)
    cache = self.large.empty_cache(batch, slots)
    hard = _heat(logits) > self.threshold
    cache, said, _ = self._read(cache, text, lengths, hard, logits)
    heard = logits if self.signal == "small" else said
    ring = EntropyRing.empty(batch, self.window).push(_heat(heard))
    memory = Memory(cache, text, ring, hard, jnp.zeros(batch, jnp.int32))
    return self._decide(memory), said

  def twin_flops(self, model, plain, slots):
    del model, plain
    read = lambda token: self.large(token, self.large.empty_cache(1, slots))
    return jnp.float32(flops(read, jax.ShapeDtypeStruct((1, 1), jnp.int32)))

  def step(self, model, last, cache, memory, draw, live) -> Step:
    at = cache.length
    out = model(last[:, None], cache, lengths=live.astype(jnp.int32))
    row = jnp.arange(last.shape[0])
    text = memory.text.at[row, at].set(last, mode="drop")
    small = out.logits[:, 0]
    asked = memory.large & live
    ours, logits, cost = self._read(memory.cache, text, at + 1, asked, small)
    said = small if self.signal == "small" else logits
    ring = memory.ring.push(_heat(said), live)
    memory = Memory(ours, text, ring, memory.large, memory.since + live)
    depth = out.depth[:, 0] + jnp.where(asked, _depth(self.large), 0)
    return Step(
      draw.token(logits, at + 1)[:, None],
      live.astype(jnp.int32),
      out.cache,
      self._decide(memory),
      depth,
      out.cost + cost,
      jnp.zeros_like(live),
    )

  def _decide(self, memory: Memory) -> Memory:
    wanted = memory.ring.mean() > self.threshold
    first = memory.ring.count == 1  # nothing was said before
    free = (memory.since >= self.dwell) | first
    large = jnp.where(free, wanted, memory.large)
    since = jnp.where(large != memory.large, 0, memory.since)
    return memory._replace(large=large, since=since)

  def _read(self, cache, text, length, asked, logits):
    """The large model reads what it missed, where it is asked."""
    return catch_up(
      self.large, cache, text, length, asked, logits, chunks=self.chunks
    )


def _heat(logits):
  """Entropy; what is NaN is as unsure as can be."""
  return jnp.nan_to_num(entropy(logits), nan=jnp.inf)


def _depth(model) -> int:
  return layer_count(model.layers) * model.layers.depth
