# SPDX-License-Identifier: Apache-2.0
"""What recipes work with: the model, the text, lessons, checks.

Axes: N windows, S tokens of a window, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adaptivejax import decode, surgery
from adaptivejax.adapt.config import AdaptConfig
from adaptivejax.adapt.text import Text
from adaptivejax.core.budget import solve_setting
from adaptivejax.nn import ByBlocks, Lens, adjust, with_look
from adaptivejax.nn.stack import layer_count
from adaptivejax.training.distill import distill

DENSE_BLOCK = 512
"""Keys of a block where all are to be read: the fastest, on a CPU."""
PROBE = 256
"""Tokens of training text on which exactness and budgets are looked at."""


@dataclasses.dataclass
class Bench:
  """What recipes work with.

  Attributes:
    model: as it was trained; distillation starts from it.
    fast: the same, its kernels out-major: what is timed.
    text: to learn from.
    config: how much of everything.
    say: called with a line of what is being done.
    tick: called after every update of a lesson.
  """

  model: Any
  fast: Any
  text: Text
  config: AdaptConfig
  say: Callable[[str], Any] = lambda line: None
  tick: Callable[..., Any] = lambda *args: None
  lens: Lens | None = None

  @property
  def layers(self) -> int:
    return layer_count(self.model.layers)

  @property
  def blocks(self) -> dict[str, int]:
    """Sizes of blocks for looks that choose some."""
    size = 128 if self.config.long >= 1024 else 8
    return {"block_q": size, "block_kv": size}

  def before(self, size: int) -> jax.Array:
    """The beginning of the training text, i32[1, size]."""
    return jnp.asarray(self.text.train.reshape(1, -1)[:, :size])

  @functools.cached_property
  def dense(self) -> Any:
    """The model, reading prompts by blocks.

    Much faster than plain attention, and so what methods have to beat there.
    """
    return self.by_blocks(self.fast)

  def by_blocks(self, model) -> Any:
    """Reads prompts by blocks: all keys, but not the future."""
    size = min(DENSE_BLOCK, self.config.read)
    return with_look(model, ByBlocks(block_q=size, block_kv=size))

  @functools.cached_property
  def probe(self) -> jax.Array:
    """A few windows of training text, i32[N, S]."""
    rows = max(PROBE // self.config.context, 1)
    return jnp.asarray(self.text.train[:rows])

  @functools.cached_property
  def long_probe(self) -> jax.Array:
    """Some blocks of training text, i32[1, S]."""
    return self.before(8 * self.blocks["block_q"] + 1)

  def exact(self, changed, stack=decode.FULL, probe=None) -> float:
    """The largest change of a logit at the full budget."""
    probe = self.probe if probe is None else probe
    return surgery.exactness(self.model, changed, probe, stack=stack)

  def exact_after(self, changed, prime=lambda model, prompt: decode.FULL):
    """The same for a token behind a prompt that `prime` makes a stack of.

    The cache has room for more, so that what is kept of it is a list.
    """
    stack = prime(changed, self.long_probe[:, :-1])
    gap = _next(changed, stack, self.long_probe) - self.next_logits
    return float(jnp.abs(gap).max())

  @functools.cached_property
  def next_logits(self) -> jax.Array:
    return _next(self.dense, decode.FULL, self.long_probe)

  def teach(self, student, loss, rates, share: float = 1.0):
    """The student after a lesson of `share` of the configured steps."""
    return distill(
      student,
      self.model,
      self.text.train,
      loss,
      rates=rates,
      steps=max(int(self.config.steps * share), 1),
      batch=self.config.batch,
      seed=self.config.seed,
      progress=self.tick,
    )

  def settled(self, model, share: float, span: float):
    """The model with its settings at `share` of the FLOPs, on the probe."""
    read = jax.jit(lambda m, s: adjust(m, s)(self.probe).cost.share)
    spent = lambda setting: float(read(model, jnp.float32(setting)))
    try:
      found = solve_setting(spent, share, low=-span, high=span)
    except ValueError:  # even the least is more
      found = span
    return adjust(model, jnp.float32(found))


@jax.jit
def _next(model, stack, tokens):
  """Logits behind the last of `tokens`, which comes alone."""
  cache = model.empty_cache(1, 2 * tokens.shape[1])
  cache = model(tokens[:, :-1], cache).cache
  return model(tokens[:, -1:], cache, stack=stack).logits
