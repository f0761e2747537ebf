# SPDX-License-Identifier: Apache-2.0
"""How tokens are decoded: one per step through a stack, or several at once.

A `Policy` turns the last token of each row into the next ones.  It is a frozen
dataclass, registered with JAX: its arrays (thresholds, tables, a second model)
are data, its plain numbers are static.  What it remembers from step to step is
its *memory*, a pytree with a row of each leaf per row of the batch.

Axes: B batch, P prompt tokens, K tokens per step, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import Cost
from adaptivejax.core.sampling import Draw
from adaptivejax.nn.stack import check_stack


def static(default: Any) -> Any:
  """A field of a policy that is part of the program, not data."""
  return dataclasses.field(default=default, metadata={"static": True})


class Step(NamedTuple):
  """What a step made.

  Attributes:
    tokens: the next tokens of each row, i32[B, K], of which `count` are real.
    count: i32[B], at least 1 for a live row.
    cache: with the last token and all new ones but the newest.
    memory: for the next step.
    depth: layers run for each row in this step, f32[B].
    cost: of the step; the engine counts the twin's itself.
    stop: rows that end after these tokens by the policy's will, bool[B].
  """

  tokens: Array
  count: Array
  cache: KVCache
  memory: Any
  depth: Array
  cost: Cost
  stop: Array


class Policy:
  """The protocol; see `ByStack` for the simplest one."""

  @property
  def reach(self) -> int:
    """Cache slots that a step needs: its tokens at most, or more (static)."""
    return 1

  def twin_flops(self, model, plain: Float[Array, ""], slots: int):
    """FLOPs of a token by the dense twin, f32[].

    Args:
      model: as in `step`.
      plain: what `model` spends on a token with all its layers.
      slots: of the cache (static).
    """
    del model, slots
    return plain

  def check(self, model) -> None:
    """Raises ValueError if it cannot decode with `model`."""

  def start(
    self,
    model,
    prompt: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    slots: int,
    logits: Float[Array, "B V"],
  ) -> tuple[Any, Float[Array, "B V"]]:
    """`(memory, logits)` after a prompt.

    Args:
      model: has read the prompt, with all its layers.
      prompt: row b has `lengths[b]` tokens.
      lengths: see there.
      slots: of the cache (static), for a policy that has another one.
      logits: what `model` says after each prompt; the first token is drawn from
        those that are returned.
    """
    del model, prompt, lengths, slots
    return None, logits

  def step(
    self,
    model,
    last: Int[Array, " B"],
    cache: KVCache,
    memory: Any,
    draw: Draw,
    live: Bool[Array, " B"],
  ) -> Step:
    """The tokens after `last`, which the cache does not hold yet.

    Nothing is read of rows that are not `live`, and nothing may wait for them.
    The next token has position `cache.length + 1`.
    """
    raise ValueError(f"{type(self).__name__} does not say how it steps.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByStack(Policy):
  """One token per step, through a stack (`nn.stack`)."""

  stack: Any

  def check(self, model) -> None:
    check_stack(self.stack, model.layers)

  def step(self, model, last, cache, memory, draw, live) -> Step:
    reads = live.astype(jnp.int32)  # a row that is done reads nothing
    out = model(last[:, None], cache, lengths=reads, stack=self.stack)
    token = draw.token(out.logits[:, -1], cache.length + 1)
    return Step(
      token[:, None],
      reads,
      out.cache,
      memory,
      out.depth[:, -1],
      out.cost,
      jnp.zeros_like(live),
    )
