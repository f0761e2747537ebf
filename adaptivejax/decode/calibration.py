# SPDX-License-Identifier: Apache-2.0
"""A threshold that is shown to be safe, by reading text with and without exits.

Axes: N texts, S their tokens, J thresholds, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from adaptivejax.core.losses import cross_entropy
from adaptivejax.core.risk import (
  PValue,
  check_promise,
  hoeffding_bentkus,
  learn_then_test,
)
from adaptivejax.nn.policy import ByStack

Loss = Callable[[Array, Array, Array], Array]
"""`(logits f[N,V], logits of all layers f[N,V], next tokens i32[N]) -> f32[N]`,
what a token loses by the exits; below 0 what it gains."""


class Calibration(NamedTuple):
  """What calibration found.

  Attributes:
    threshold: the cheapest that is shown to be safe; infinity, which never
      exits, if none is.
    risks: mean loss at each threshold up to the first that is not shown to be
      safe, which is the last that was read.
    depths: mean layers per token at each of these.
  """

  threshold: float
  risks: np.ndarray
  depths: np.ndarray


def inconsistency(logits, full, targets) -> Array:
  """1 where another token is the likeliest than with all layers, else 0."""
  del targets
  return (logits.argmax(-1) != full.argmax(-1)).astype(jnp.float32)


def excess_error(logits, full, targets) -> Array:
  """1 where only all layers say the next token, -1 where only the exit does."""
  right = lambda logits: (logits.argmax(-1) == targets).astype(jnp.float32)
  return right(full) - right(logits)


def excess_loss(logits, full, targets) -> Array:
  """How much more the next token costs than with all layers, in nats."""
  return cross_entropy(logits, targets) - cross_entropy(full, targets)


def calibrate(
  model,
  texts: Int[Array, "N S"],
  stack: Callable,
  thresholds: Sequence[float] | Float[Array | np.ndarray, " J"],
  *,
  delta: float,
  epsilon: float = 0.05,
  loss: Loss = inconsistency,
  prompt: int = 1,
  p_value: PValue = hoeffding_bentkus,
) -> Calibration:
  """The lowest threshold at which a text is shown to lose at most `delta`.

  With probability 1 - epsilon over the draw of the texts, the expected loss of
  a new text of the same kind, read as if decoding it, is at most `delta`
  (`core.risk.learn_then_test`).  The loss of a text is the mean over its
  tokens, clipped to 0..1: a text, whose tokens are not independent, is one
  sample, and what one text gains makes up for no other.

  Args:
    model: a `DecoderLM`.
    texts: independent, such as windows of different files; read in one batch,
      N S V logits at once.
    stack: one that takes a `threshold`, such as `Partial(calm)`.
    thresholds: to try, falling from the safest; chosen before seeing the texts.
    delta: expected loss to tolerate, in (0, 1).
    epsilon: probability to be wrong, in (0, 1).
    loss: what is lost at a token: `inconsistency`, `excess_error`,
      `excess_loss`, or another.
    prompt: tokens of each text that run all layers and do not count (static).
    p_value: see `core.risk`.
  """
  levels = np.asarray(thresholds, np.float32)
  falls = levels.ndim == 1 and levels.size and (np.diff(levels) < 0).all()
  if not falls or np.isnan(levels[0]):
    raise ValueError(
      f"`thresholds` must fall strictly, from the safest on; got {thresholds}."
    )
  if not 1 <= prompt < texts.shape[1] - 1:
    raise ValueError(
      f"{prompt=} must leave at least two of the {texts.shape[1]} tokens of a"
      " text: one to read and one to foretell."
    )
  check_promise(delta, epsilon)
  known, last = np.asarray(texts), model.config.vocab - 1
  if not known.size or known.min() < 0 or known.max() > last:
    raise ValueError(
      f"`texts` must hold tokens in 0..{last}, the model's vocabulary; got"
      f" {known}."
    )
  bound = stack if isinstance(stack, Partial) else Partial(stack)
  at = lambda level: Partial(
    bound.func, *bound.args, **{**bound.keywords, "threshold": level}
  )
  ByStack(at(levels[0])).check(model)
  losses, depths, found = [], [], None
  for j, level in enumerate(levels):
    lost, depth = _read(model, texts, at(level), loss, prompt)
    losses.append(np.asarray(lost))
    depths.append(float(depth.mean()))
    found = learn_then_test(
      np.stack(losses, -1), delta=delta, epsilon=epsilon, p_value=p_value
    )
    if found != j:
      break
  threshold = np.inf if found is None else float(levels[found])
  return Calibration(threshold, np.mean(losses, 1), np.array(depths))


@functools.partial(jax.jit, static_argnames=("loss", "prompt"))
def _read(model, texts, stack, loss, prompt):
  """Loss and depth of each text, f32[N]."""
  full = model(texts[:, :-1]).logits[:, prompt:]
  cache = model.empty_cache(texts.shape[0], texts.shape[1] - 1)
  cache = model(texts[:, :prompt], cache).cache

  def step(cache, now):
    token, full, target = now
    out = model(token[:, None], cache, stack=stack)
    return out.cache, (loss(out.logits[:, 0], full, target), out.depth[:, 0])

  time_first = lambda a: jnp.moveaxis(a, 1, 0)
  steps = texts[:, prompt:-1], full, texts[:, prompt + 1 :]
  _, (losses, depths) = lax.scan(step, cache, jax.tree.map(time_first, steps))
  return jnp.clip(losses.mean(0), 0, 1), depths.mean(0)
