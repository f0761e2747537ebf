# SPDX-License-Identifier: Apache-2.0
r"""CALM: a token leaves the layers once the model is sure of the next token.

Schuster et al., 2022, https://arxiv.org/abs/2207.07061

With c_l a measure of confidence after layer l, token t leaves after (sec. 3)

    exit = min { l >= min_depth : c_l >= lambda_t },   else L,
    lambda_t = lambda (9/10 + 1/10 exp(-tau t / N)),

and the skipped layers' keys and values are projected from the exit state (sec.
3.1), so that later tokens may go deeper.  The prompt runs all layers.  c_l is
(sec. 3.3) the gap between the two largest probabilities, `MARGIN`; the cosine
of successive states, `STATE`; or a classifier trained to foresee whether layer
L would say the same, `MetaClassifier` by `meta_loss`.  Also `MAX_PROB`.

Primitive: `depth_loop` on a confidence, then `kv_propagate` (`nn.early_exit`).
Departs: a row that is sure waits, frozen, until its batch is (exits stay per
row; the published code lets the least confident row decide for all), and the
state that is propagated is the exit state, as in the paper (the published code
propagates that of the first exit).  The decay is the published code's, constant
at tau = 0, and counts the prompt into t.  `decode.calibrate` gives lambda the
guarantee of sec. 4, on given text instead of generated text.
Axes: L layers, B batch, T tokens, D features.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adaptivejax.core.losses import cross_entropy
from adaptivejax.nn.confidence import MARGIN, Measure, MetaClassifier
from adaptivejax.nn.exit import check_exits, early_exit
from adaptivejax.nn.setting import refuse_nan
from adaptivejax.nn.stack import StackOutput, checked_by


def _check(
  total, *, threshold=1.0, min_depth=1, every=1, max_depth=None, decay=0.0,
  horizon=1.0, **rest,
):  # fmt: skip
  del rest
  refuse_nan(threshold=threshold, decay=decay, horizon=horizon)
  check_exits(total, min_depth=min_depth, every=every, max_depth=max_depth)
  if not isinstance(horizon, jax.core.Tracer) and horizon <= 0:
    raise ValueError(
      f"horizon={horizon} must be above 0, the tokens over which it decays."
    )


@checked_by(_check)
def calm(
  layers,
  x: Float[Array, "B T D"],
  positions,
  cache=None,
  *,
  readout,
  key=None,
  threshold: Float[Array, ""] | float,
  measure: Measure = MARGIN,
  min_depth=1,
  every=1,
  max_depth=None,
  decay: Float[Array, ""] | float = 0.0,
  horizon: Float[Array, ""] | float = 1.0,
) -> StackOutput:
  """A stack that stops at the first confident layer, when decoding (T = 1).

  Args:
    threshold: lambda; above 1 never exits (with a decay, from 10/9), 0 exits as
      soon as it may, `STATE` from -1 (dynamic).
    measure: c_l, see `nn.confidence`; a pytree.
    min_depth: layers that every token runs (dynamic).
    every: look after each `every`-th layer only (dynamic).
    max_depth: layers that no token runs more of, sure or not (dynamic).
    decay: tau; 0 is one threshold for all positions (dynamic).
    horizon: N, the tokens over which it decays, above 0 (dynamic).

  Other arguments as in `nn.stack`.  Training has no exits: see `sorted_loss`.
  """
  t = positions[:, 0].astype(jnp.float32)
  level = threshold * (1 + 0.1 * jnp.expm1(-decay * t / horizon))

  def sure(l, before, after, memory):
    c = measure(l, before[:, 0], after[:, 0], readout)
    return c >= level, memory

  return early_exit(
    layers,
    x,
    positions,
    cache,
    sure,
    readout=readout,
    key=key,
    min_depth=min_depth,
    every=every,
    max_depth=max_depth,
  )


def meta_loss(
  classifier: MetaClassifier, hidden: Float[Array, "L B T D"], readout
) -> Float[Array, ""]:
  """What to train a `MetaClassifier` on, in nats; the model gets no gradient.

  Cross-entropy of "the most likely token after layer l is that after layer L",
  over l < L; both answers weigh the same in total, however rare one is.

  Args:
    classifier: to train.
    hidden: after every layer, from `nn.every_layer`.
    readout: hidden state to logits.
  """
  if hidden.shape[0] < 2:
    raise ValueError("one layer leaves nowhere to exit before; give 2 or more.")
  hidden = jax.lax.stop_gradient(hidden)
  said = jax.lax.map(lambda h: readout(h).argmax(-1), hidden)
  agrees = jax.lax.stop_gradient(said[:-1] == said[-1])
  nats = cross_entropy(classifier.scores(hidden[:-1]), agrees.astype(jnp.int32))
  mean = lambda those: (nats * those).sum() / jnp.maximum(those.sum(), 1)
  return (mean(agrees) + mean(~agrees)) / 2
