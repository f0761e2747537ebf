# SPDX-License-Identifier: Apache-2.0
r"""Stop&Exit controller: a classifier lets a token leave, or ends the text.

Sun et al., 2024, https://arxiv.org/abs/2401.09964

After an exit layer, with h the hidden state, p = softmax(W h) over three
choices, of which the likeliest counts if it is likely enough:

    STOP      no exit will say the right token:    p > stop: end the text here
    EXIT      this exit or an earlier one does:    p > exit: leave the layers
    CONTINUE  a later one will

Skipped layers' keys and values are projected from the state a token left with.
The controller is trained on the frozen model, teacher-forced, by cross-entropy
with weight j on the j-th exit.

Primitive: `depth_loop` on a controller, then `kv_propagate` (`nn.early_exit`).
Departs: one readout for all exits, trained with the model (`sorted_loss`),
where the paper trains a head per exit on the frozen model; a row that has left
waits for its batch.
Axes: L layers, J exits, B batch, T tokens, D features.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.losses import cross_entropy
from adaptivejax.nn.exit import check_exits, early_exit
from adaptivejax.nn.policy import Policy, Step
from adaptivejax.nn.setting import refuse_nan, refuse_outside
from adaptivejax.nn.stack import StackOutput, checked_by, layer_count

STOP, EXIT, CONTINUE = range(3)


def _check(
  total, *, stop=1.0, exit=1.0, min_depth=1, every=1, max_depth=None, **settings
):
  del settings
  refuse_nan(stop=stop, exit=exit)
  check_exits(total, min_depth=min_depth, every=every, max_depth=max_depth)


@checked_by(_check)
def stop_and_exit(
  layers, x: Float[Array, "B T D"], positions, cache=None, *, readout, key=None,
  controller, stop, exit, min_depth=1, every=1, max_depth=None,
) -> StackOutput:  # fmt: skip
  """A stack that asks the controller when decoding (T = 1).

  Args:
    controller: hidden state to three scores, such as a `linear(D, 3)`.
    stop, exit: above which probability they count; 1 means never (dynamic).
    min_depth, every, max_depth: which layers are exits, as in `nn.early_exit`
      (dynamic).

  Other arguments as in `nn.stack`.  `notes` are the rows to stop, bool[B].
  """

  def choose(l, before, after, stopped):
    del l, before, stopped
    scores = controller(after[:, 0]).astype(jnp.float32)
    p, best = jax.nn.softmax(scores, axis=-1), scores.argmax(-1)
    stops = (best == STOP) & (p[:, STOP] > stop)
    return stops | ((best == EXIT) & (p[:, EXIT] > exit)), stops

  return early_exit(
    layers, x, positions, cache, choose, jnp.zeros(x.shape[0], bool),
    readout=readout, key=key, min_depth=min_depth, every=every,
    max_depth=max_depth,
  )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StopAndExit(Policy):
  """Decodes by `stop_and_exit`; a text that is stopped ends with `end`."""

  controller: Any
  stop: Any
  exit: Any
  end: Any = 0
  min_depth: Any = 1
  every: Any = 1
  max_depth: Any = None

  def check(self, model) -> None:
    _check(layer_count(model.layers), **vars(self))
    vocab, width = model.config.vocab, model.config.features
    refuse_outside(0, vocab - 1, "the model's vocabulary", end=self.end)
    state = jax.ShapeDtypeStruct((1, width), jnp.float32)
    try:
      scores = jax.eval_shape(self.controller, state).shape
    except (TypeError, ValueError, AttributeError):
      scores = None
    if scores != (1, 3):
      raise ValueError(
        f"`controller` must make three scores of {width} features, as"
        f" `linear({width}, 3)` does: train one with `controller_loss`."
      )

  def step(self, model, last, cache, memory, draw, live) -> Step:
    settings = {k: v for k, v in vars(self).items() if k != "end"}
    stack = Partial(stop_and_exit, **settings)
    reads = live.astype(jnp.int32)
    out = model(last[:, None], cache, lengths=reads, stack=stack)
    token = draw.token(out.logits[:, -1], cache.length + 1)
    token = jnp.where(out.notes, self.end, token)[:, None]
    return Step(
      token, reads, out.cache, memory, out.depth[:, -1], out.cost, out.notes
    )


def controller_labels(right: Bool[Array, "J B T"]) -> Int[Array, "J B T"]:
  """The right choice at each exit, given which exits say the right token."""
  by_now = jnp.cumsum(right, axis=0) > 0
  return jnp.where(by_now, EXIT, jnp.where(right.any(0), CONTINUE, STOP))


def controller_loss(
  controller, hidden: Float[Array, "L B T D"], readout,
  targets: Int[Array, "B T"], *, every: int = 1,
) -> Float[Array, ""]:  # fmt: skip
  """What to train the controller on, in nats; the model gets no gradient.

  `hidden` is of `nn.every_layer`, `targets` are the next tokens; exits are each
  `every`-th layer but the last (static).
  """
  total = hidden.shape[0]
  if not 1 <= every < total:
    raise ValueError(f"{every=} must lie in 1..{total - 1}, before the last.")
  exits = [*range(every, total, every), total]
  hidden = jax.lax.stop_gradient(hidden[jnp.asarray(exits) - 1])
  right = jax.lax.map(lambda h: readout(h).argmax(-1) == targets, hidden)
  labels = controller_labels(right)[:-1]  # the last layer is not asked
  nats = cross_entropy(controller(hidden[:-1]), labels).mean((1, 2))
  weights = jnp.arange(1.0, len(exits))
  return (nats * weights).sum() / weights.sum()
