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
from adaptivejax.core.risk import PValue, hoeffding_bentkus, learn_then_test

Loss = Callable[[Array, Array, Array], Array]
"""`(logits f[N,V], logits of all layers f[N,V], next tokens i32[N])`, what a
token loses by the exits, in 0..1, f32[N]."""


class Calibration(NamedTuple):
  """What calibration found.

  Attributes:
    threshold: the cheapest that is shown to be safe; infinity, which never
      exits, if none is.
    risks: mean loss at each threshold, f32[J].
    depths: mean layers per token at each threshold, f32[J].
  """

  threshold: float
  risks: np.ndarray
  depths: np.ndarray


def inconsistency(logits, full, targets) -> Array:
  """1 where another token is the likeliest than with all layers, else 0."""
  del targets
  return (logits.argmax(-1) != full.argmax(-1)).astype(jnp.float32)


def excess_loss(logits, full, targets) -> Array:
  """How much more the next token costs than with all layers, in nats, 0..1."""
  more = cross_entropy(logits, targets) - cross_entropy(full, targets)
  return jnp.clip(more, 0, 1)


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

  With probability 1 - epsilon over the draw of the texts, the mean loss per
  token of a new text of the same kind, read as if decoding it, is at most
  `delta` (`core.risk.learn_then_test`).  A text is one sample: its tokens are
  not independent.

  Args:
    model: a `DecoderLM`.
    texts: independent, such as windows of different files; read in one batch,
      N S V logits at once.
    stack: one that takes a `threshold`, such as `Partial(calm)`.
    thresholds: to try, falling from the safest; chosen before seeing the texts.
    delta: mean loss to tolerate, in (0, 1).
    epsilon: probability to be wrong, in (0, 1).
    loss: what is lost at a token.
    prompt: tokens of each text that run all layers and do not count (static).
    p_value: see `core.risk`.
  """
  levels = np.asarray(thresholds, np.float32)
  if levels.ndim != 1 or not levels.size or not (np.diff(levels) < 0).all():
    raise ValueError(
      f"`thresholds` must fall strictly, from the safest on; got {thresholds}."
    )
  if not 1 <= prompt < texts.shape[1] - 1:
    raise ValueError(
      f"{prompt=} must leave at least two of the {texts.shape[1]} tokens of a"
      " text: one to read and one to foretell."
    )
  bound = stack if isinstance(stack, Partial) else Partial(stack)
  at = lambda level: Partial(
    bound.func, *bound.args, **{**bound.keywords, "threshold": level}
  )
  read = [_read(model, texts, at(x), loss, prompt) for x in levels]
  losses, depths = (
    np.stack([np.asarray(a) for a in b], -1) for b in zip(*read)
  )
  found = learn_then_test(losses, delta=delta, epsilon=epsilon, p_value=p_value)
  threshold = np.inf if found is None else float(levels[found])
  return Calibration(threshold, losses.mean(0), depths.mean(0))


@functools.partial(jax.jit, static_argnames=("loss", "prompt"))
def _read(model, texts, stack, loss, prompt):
  """Loss and depth per token, means over each text, f32[N]."""
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
  return losses.mean(0), depths.mean(0)
