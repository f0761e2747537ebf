# SPDX-License-Identifier: Apache-2.0
"""When to stop: what halting rules read, and what they remember.

A rule compares a number with a threshold, which is data.  Of `max_prob`,
`margin`, `logit_margin`, `saturation`, `patience` and `cdf` a higher one is
surer; of `entropy` and `delta` a lower one: negate them.  All are in f32, and
NaN stays NaN, which no comparison passes: a row that is NaN never stops early.

Probabilities saturate: `max_prob` is exactly 1 from a logit gap of about 17, so
that many samples tie there.  A threshold above 1 means never; a rule that must
tell sure samples apart reads `logit_margin`.

What needs a memory takes it last and returns it, `(now, memory) -> (number,
memory)`, rows leading, as `depth_loop` carries it.

Axes: B rows, C classes, D features, K exits, W steps remembered.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def max_prob(logits: Float[Array, "... C"]) -> Float[Array, "..."]:
  """Probability of the most likely class, in 1/C..1."""
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-1).max(-1)


def margin(logits: Float[Array, "... C"]) -> Float[Array, "..."]:
  """Difference of the two largest probabilities, in 0..1."""
  return _gap(jax.nn.softmax(logits.astype(jnp.float32), axis=-1))


def logit_margin(logits: Float[Array, "... C"]) -> Float[Array, "..."]:
  """Difference of the two largest logits, at least 0: does not saturate."""
  return _gap(logits.astype(jnp.float32))


def entropy(logits: Float[Array, "... C"]) -> Float[Array, "..."]:
  """Entropy of the class probabilities in nats, 0..log C; lower is surer."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  log_p = jnp.where(log_p == -jnp.inf, 0, log_p)  # an excluded class: 0 log 0
  excluded = logits == -jnp.inf
  return -jnp.where(excluded, 0, jnp.exp(log_p) * log_p).sum(-1)


def saturation(
  before: Float[Array, "... D"], after: Float[Array, "... D"]
) -> Float[Array, "..."]:
  """Cosine of a state with what a layer made of it, in -1..1; 0 for zeros."""
  cosine = (_unit(before) * _unit(after)).sum(-1)
  return jnp.clip(cosine, -1, 1)


def delta(
  before: Float[Array, "... D"], after: Float[Array, "... D"]
) -> Float[Array, "..."]:
  """Root mean square change between two outputs; lower is surer.

  Yue et al., 2024 (DeeR), https://arxiv.org/abs/2411.02359
  """
  change = after.astype(jnp.float32) - before.astype(jnp.float32)
  return jnp.sqrt((change * change).mean(-1))


class Streak(NamedTuple):
  """How long a prediction has stood: `last` and `count`, i32[B]."""

  last: Int[Array, "..."]
  count: Int[Array, "..."]

  @classmethod
  def none(cls, rows: int) -> "Streak":
    """Nothing predicted yet."""
    return cls(jnp.full(rows, -1, jnp.int32), jnp.zeros(rows, jnp.int32))


def patience(
  prediction: Int[Array, "..."], memory: Streak
) -> tuple[Int[Array, "..."], Streak]:
  """How many times in a row the prediction was that of the exit before.

  0 at the first exit, at every change, and for a prediction below 0: none.
  """
  same = (prediction == memory.last) & (prediction >= 0)
  count = jnp.where(same, memory.count + 1, 0)
  return count, Streak(prediction.astype(jnp.int32), count)


def cdf(
  stop: Float[Array, "..."], survived: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """Probability to have stopped by now, given that to stop here if still there.

  Args:
    stop: lambda of this exit, in 0..1.
    survived: probability to be still there; ones before the first exit.
  """
  survived = survived * (1 - stop)
  return 1 - survived, survived


def exit_distribution(stop: Float[Array, "K ..."]) -> Float[Array, "K ..."]:
  """p_i = lambda_i prod_{j<i} (1 - lambda_j); the last takes the remainder.

  Banino et al., 2021 (PonderNet), https://arxiv.org/abs/2107.05407, eq. 3.
  """
  stay = jnp.cumprod(1 - stop[:-1], axis=0)
  there = jnp.concatenate([jnp.ones_like(stop[:1]), stay])
  return there * jnp.concatenate([stop[:-1], jnp.ones_like(stop[:1])])


class Ponder(NamedTuple):
  """What a row has gathered while it ponders, in f32."""

  y: Float[Array, "... D"]  # its output so far
  halted: Float[Array, "..."]  # sum of the weights given to states
  remainder: Float[Array, "..."]  # of those, to the last state

  @classmethod
  def start(cls, x: Float[Array, "... D"]) -> "Ponder":
    """Before the first step."""
    none = jnp.zeros(x.shape[:-1], jnp.float32)
    return cls(jnp.zeros(x.shape, jnp.float32), none, none)


def ponder(
  stop: Float[Array, "..."],
  state: Float[Array, "... D"],
  memory: Ponder,
  *,
  last: Bool[Array, ""] | bool,
  epsilon: float = 0.01,
) -> tuple[Bool[Array, "..."], Ponder]:
  """Who halts at this step, and the output with this state in it.

  A row halts once its `stop` (0..1) sum to 1 - epsilon, or at the `last` step;
  states weigh what their `stop` says, that of the halt the remainder to 1.
  Graves, 2016, https://arxiv.org/abs/1603.08983, eqs. 6 to 8 and 13.
  """
  halts = (memory.halted + stop >= 1 - epsilon) | last
  remainder = 1 - memory.halted
  weight = jnp.where(halts, remainder, stop.astype(jnp.float32))
  y = memory.y + weight[..., None] * state.astype(jnp.float32)
  return halts, Ponder(y, memory.halted + weight, remainder)


class EntropyRing(NamedTuple):
  """The entropies of the last W steps of each row.

  Attributes:
    values: f32[B, W], in no order.
    count: steps seen, i32[B].
  """

  values: Float[Array, "B W"]
  count: Int[Array, " B"]

  @classmethod
  def empty(cls, rows: int, width: int) -> "EntropyRing":
    """Nothing seen yet; remembers `width` steps (static)."""
    if rows < 1 or width < 1:
      raise ValueError(f"a ring needs {rows=} and {width=} of at least 1.")
    return cls(
      jnp.zeros((rows, width), jnp.float32), jnp.zeros(rows, jnp.int32)
    )

  def push(
    self, value: Float[Array, " B"], live: Bool[Array, " B"] | bool = True
  ) -> "EntropyRing":
    """Remembers one step of the `live` rows, over their oldest."""
    width = self.values.shape[1]
    slot = jnp.arange(width) == (self.count % width)[:, None]
    here = slot & jnp.broadcast_to(live, self.count.shape)[:, None]
    values = jnp.where(here, value.astype(jnp.float32)[:, None], self.values)
    return EntropyRing(values, self.count + live)

  def mean(self) -> Float[Array, " B"]:
    """Mean over the steps remembered; inf, least sure, if there are none."""
    width = self.values.shape[1]
    known = jnp.minimum(self.count, width)
    seen = jnp.arange(width) < known[:, None]
    total = jnp.where(seen, self.values, 0).sum(1)
    return jnp.where(known > 0, total / jnp.maximum(known, 1), jnp.inf)


def _gap(scores):
  """Largest minus second largest."""
  if scores.shape[-1] < 2:
    raise ValueError(
      f"a margin needs at least two classes; got {scores.shape[-1]}."
    )
  best = scores.argmax(-1, keepdims=True)  # a sort would cost far more
  first = jnp.arange(scores.shape[-1]) == best
  others = jnp.where(first, -jnp.inf, scores).max(-1)
  return scores.max(-1) - others


def _unit(x):
  """`x` at length 1, whatever its size; zeros stay."""
  x = x.astype(jnp.float32)
  size = lax.stop_gradient(jnp.abs(x).max(-1, keepdims=True))
  x = x / jnp.where(size > 0, size, 1)
  square = (x * x).sum(-1, keepdims=True)
  return x * lax.rsqrt(jnp.where(square > 0, square, 1))
