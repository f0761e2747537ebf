# SPDX-License-Identifier: Apache-2.0
"""How far an early answer of a pretrained model can be trusted.

Axes: N tokens, L layers, E exits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from adaptivejax.core.halting import margin, max_prob
from adaptivejax.nn import Lens, every_layer, lens_loss
from adaptivejax.report.data import Grid
from adaptivejax.training.heads import fit_head


class Sure(NamedTuple):
  """What each layer says of each token, and whether the last one agrees.

  Attributes:
    largest: the largest probability, f32[L, N].
    gap: the margin between the two largest, f32[L, N].
    agrees: whether the likeliest token is that of the last layer, bool[L, N].
  """

  largest: np.ndarray
  gap: np.ndarray
  agrees: np.ndarray


def exit_layers(layers: int) -> tuple[int, ...]:
  """Layers that are looked at, from 0: late ones, where exits may be."""
  first, step = layers * 2 // 3, max(layers // 9, 1)
  return tuple(range(first - 1, layers - 1, step)) or (layers - 2,)


def fit_lens(bench) -> Lens:
  """A lens for the model, trained on its text."""
  config = bench.model.config
  exits = exit_layers(bench.layers)
  return fit_head(
    Lens(bench.layers, config.features),
    functools.partial(lens_loss, exits=exits),
    bench.model,
    bench.text.train[:, : max(bench.config.context // 2, 2)],
    steps=bench.config.steps,
    batch=bench.config.batch,
    learning_rate=1e-3,
    progress=bench.tick,
  )


@jax.jit
def _look(model, lens: Lens | None, tokens) -> tuple[Array, Array, Array]:
  hidden = model(tokens, stack=every_layer).hidden
  last = model.readout(hidden[-1]).argmax(-1)

  def one(step):
    l, state = step
    logits = model.readout(state if lens is None else lens(l, state))
    return max_prob(logits), margin(logits), logits.argmax(-1) == last

  steps = jnp.arange(len(hidden)), hidden
  return jax.lax.map(one, steps)


def confidences(bench, lens: Lens | None, tokens=None) -> Sure:
  """What the layers say of a text; of the probe, if none is given."""
  tokens = bench.probe if tokens is None else jnp.asarray(tokens)
  out = _look(bench.model, lens, tokens)
  return Sure(*(np.asarray(a).reshape(len(a), -1) for a in out))


def margin_for(sure: Sure, first: int, agree: float) -> float:
  """The lowest margin at which so many of those that leave agree.

  Leaving is at the first exit, from `first` on, whose margin is reached; 2,
  which is never, if no margin is enough.
  """
  late = np.arange(first - 1, len(sure.gap) - 1)
  for level in np.linspace(0.05, 0.995, 64):
    reached = sure.gap[late] >= level
    leaves = reached.any(0)
    at = late[reached.argmax(0)]
    right = sure.agrees[at, np.arange(leaves.size)]
    if leaves.any() and right[leaves].mean() >= agree:
      return float(level)
  return 2.0


def overconfidence(bench, lens: Lens, tokens, level: float = 0.8) -> Grid:
  """How often an exit is sure, and how often it is then right, both ways."""
  before, after = (confidences(bench, some, tokens) for some in (None, lens))

  def cells(sure: Sure, l: int) -> tuple[str, str]:
    those = sure.largest[l] > level
    right = f"{sure.agrees[l][those].mean():.0%}" if those.any() else "–"
    return f"{those.mean():.0%}", right

  rows = tuple(
    (f"layer {l + 1}", *cells(before, l), *cells(after, l))
    for l in exit_layers(bench.layers)
  )
  heads = ("exit", "sure", "then right", "sure, lens", "then right, lens")
  return Grid(
    "How far an early answer can be trusted",
    heads,
    rows,
    f"Sure: the largest probability is above {level}. Right: the last layer"
    " says the same token. On held-out text; the lens was trained on other.",
  )
