# SPDX-License-Identifier: Apache-2.0
"""How sure a model is of the next token, after each of its layers.

A measure is called as `measure(l, before, after, readout)`, with the state
before and after layer l (from 0), and gives a number that is higher the surer.
It is a pytree, so that a compiled function takes it as data: `MAX_PROB`,
`MARGIN` and `STATE`, or a trained `MetaClassifier`.

Axes: L layers, B batch, T tokens, D features, N samples.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Float

from adaptivejax.core.halting import margin, max_prob, saturation
from adaptivejax.nn.router import Router

Measure = Callable[[Array, Array, Array, Callable], Array]
"""`(l i32[], before f[..., D], after f[..., D], readout) -> f32[...]`."""


def _max_prob(l, before, after, readout):
  del l, before
  return max_prob(readout(after))


def _margin(l, before, after, readout):
  del l, before
  return margin(readout(after))


def _state(l, before, after, readout):
  del readout
  return jnp.where(l == 0, -jnp.inf, saturation(before, after))


MAX_PROB: Measure = Partial(_max_prob)
"""The largest probability, in 1/V..1."""

MARGIN: Measure = Partial(_margin)
"""The difference of the two largest probabilities, in 0..1."""

STATE: Measure = Partial(_state)
"""Cosine of the state before and after the layer: needs no logits.  The first
layer, before which there is but the embedding, is never sure."""


class MetaClassifier(nnx.Module):
  """A linear head that was trained to tell whether to leave, 0..1.

  Needs no logits; see `methods.depth.calm.meta_loss`.
  """

  def __init__(self, features: int, *, rngs: nnx.Rngs):
    self.head = Router(features, 2, rngs=rngs)

  def scores(self, x: Float[Array, "... D"]) -> Float[Array, "... 2"]:
    """Logits of "go on" and "leave", f32."""
    return self.head(x).astype(jnp.float32)

  def __call__(self, l, before, after, readout) -> Float[Array, "..."]:
    del l, before, readout
    return jax.nn.softmax(self.scores(after), axis=-1)[..., 1]


def exit_confidence(
  hidden: Float[Array, "L B T D"], readout, measure: Measure = MARGIN
) -> Float[Array, "N L"]:
  """Confidence of every token after every layer, to set thresholds on.

  Args:
    hidden: of `nn.every_layer`.
    readout: hidden state to logits.
    measure: see above.

  Feed the result to `core.budget.solve_depth_threshold`.
  """
  before = jnp.concatenate([hidden[:1], hidden[:-1]])  # the first is not read
  steps = jnp.arange(hidden.shape[0]), before, hidden
  sure = jax.lax.map(lambda s: measure(s[0], s[1], s[2], readout), steps)
  return sure.reshape(hidden.shape[0], -1).T
