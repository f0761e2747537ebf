# SPDX-License-Identifier: Apache-2.0
"""Needles, learnt from scratch by a look: accuracy beside that of all keys.

The task, lessons and model are those of `benchmarks.long_context`; what is
compared differs in its look alone, and takes as many steps on the same texts.
Texts of the last lesson are four times what the looks may choose; those before
fit, so a look learns to find before it has to leave out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptivejax.nn import Look, with_look
from benchmarks.headlines import Headline
from benchmarks.long_context import (
  EVALUATION,
  LESSONS,
  NEEDLES,
  NeedleLM,
  needle_model,
  needles,
  trained,
)

LENGTH, PAIRS = LESSONS[-1][1:]
BLOCK = 16
BLOCKS = LENGTH // 4 // BLOCK
COUNT = 512
FEATURES, HEADS = NEEDLES.features, NEEDLES.heads


def measure(
  name: str, look: Callable[[nnx.Rngs], Look], quick: bool, free: bool = False
) -> Headline:
  """Accuracy of the look and of all keys, each trained with itself.

  `free`: the look has no weights, so that where all blocks are chosen, which is
  so but in the last lesson, it need not run.
  """
  count = 8 if quick else COUNT
  dense = accuracy(needle_model(quick), count)
  sparse = accuracy(learnt(name, look, quick, free), count)
  error = (dense * (1 - dense) + sparse * (1 - sparse)) ** 0.5 / count**0.5
  figures = {"accuracy": sparse, "dense": dense, "standard_error": error}
  words = (
    f"needles of {LENGTH} tokens and {PAIRS} pairs, trained from scratch with"
    f" {BLOCKS} of {LENGTH // BLOCK} blocks: {sparse:.3f} right against"
    f" {dense:.3f} with all keys (± {error:.3f})"
  )
  learnt_at_all = dense > 0.5  # else there is nothing to keep up with
  holds = bool(sparse >= dense - 0.01) if learnt_at_all else None
  return Headline(words, figures, holds)


def learnt(name: str, look: Callable, quick: bool, free: bool) -> NeedleLM:
  """Trained with the look, now or before; `quick` trains 4 steps."""
  rngs = nnx.Rngs(0)
  model = NeedleLM(rngs=rngs)
  made = look(rngs)
  model.layers.attention.look = jax.tree.map(lambda a: a[None], made)

  def on(model, length):
    fits = free and length <= BLOCK * BLOCKS
    return with_look(model, Look()) if fits else model

  return trained(model, f"needles-{name}", quick, on)


def accuracy(model: NeedleLM, count: int) -> float:
  """Share of questions answered right; a guess is 1 / 64."""
  given = needles(count, LENGTH, PAIRS, seed=EVALUATION)
  right = [
    _right(model, given.tokens[i : i + 8], given.answer[i : i + 8])
    for i in range(0, count, 8)
  ]
  return float(np.mean(right))


@jax.jit
def _right(model, tokens, answer):
  last = jnp.full(len(tokens), tokens.shape[1] - 1)
  logits = model(tokens, read_at=last).logits[:, 0]
  return (logits.argmax(-1) == answer).mean()
