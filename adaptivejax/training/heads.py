# SPDX-License-Identifier: Apache-2.0
"""Small heads trained on a model that stays as it is.

Axes: N windows, S their tokens, L layers, B batch, T tokens, D features.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Int

from adaptivejax.nn.stack import every_layer

ADAM = optax.scale_by_adam()


def fit_head(
  head: Any,
  loss: Callable[[Any, Array, Callable, Array], Array],
  model: Any,
  windows: Int[Array | np.ndarray, "N S"],
  *,
  steps: int = 400,
  batch: int = 32,
  learning_rate: float = 3e-3,
  seed: int = 0,
  progress: Callable[[], Any] = lambda: None,
) -> Any:
  """Trains `head` on the hidden states of a frozen language model, by Adam.

  Args:
    head: pytree to train, such as a controller or a `MetaClassifier`.
    loss: `(head, hidden f[L, B, T, D], readout, targets i32[B, T]) -> f32[]`;
      static: each new function compiles anew, another model or rate does not.
    model: a `DecoderLM`; gets no gradient.
    windows: text to train on.
    steps, batch, learning_rate: of Adam, the rate falling by a cosine to 0.
    seed: of the order of the windows.
    progress: called after every step.
  """
  if min(steps, batch, len(windows)) < 1 or windows.shape[1] < 2:
    raise ValueError(
      f"{steps=}, {batch=} and the windows, {windows.shape}, must be at least"
      " 1, and a window needs a next token."
    )
  state, draw = ADAM.init(head), np.random.default_rng(seed)
  for i in range(steps):
    chosen = windows[draw.integers(0, len(windows), batch)]
    rate = learning_rate * (1 + math.cos(math.pi * i / steps)) / 2
    head, state = _step(head, state, model, chosen, rate, loss=loss)
    progress()
  return head


@functools.partial(jax.jit, static_argnames="loss")
def _step(head, state, model, tokens, rate, *, loss):
  hidden = model(tokens[:, :-1], stack=every_layer).hidden
  grad = jax.grad(loss)(head, hidden, model.readout, tokens[:, 1:])
  updates, state = ADAM.update(grad, state)
  updates = jax.tree.map(lambda u: -rate * u, updates)
  return optax.apply_updates(head, updates), state
