# SPDX-License-Identifier: Apache-2.0
r"""DeeR-VLA: a robot's model stops where deeper layers keep the action.

Yue et al., 2024, https://arxiv.org/abs/2411.02359

With a_k the action read from exit k, a control step leaves at

    exit = min { k : ||a_k - a_{k-1}|| <= eta_k  or  k = max_layer },

the change taken as root mean square.  Budgets set the thresholds: exit k gets a
share of the samples proportional to q^k (average compute), and no layer beyond
`max_layer` is ever run or need be loaded (peak compute, memory).  An exit may
be kept for several control steps.  So that the action head bears histories of
mixed depth, it is trained on states of a random exit at every step, besides the
states of each exit alone.

Primitive: `delta` in a `depth_loop`; `solve_exit_thresholds`.
Departs: thresholds come from the shares alone, without the paper's Bayesian
search around them, and the last one, where all leave, is ours; what precedes
the first exit is the caller's (the paper reads an action from layer 0), and
without it no row leaves at the first exit.
Axes: K exits, B batch, S control steps, A action, n calibration samples.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.budget import solve_exit_thresholds
from adaptivejax.core.halting import delta


class Control(NamedTuple):
  """What the rule remembers."""

  action: Float[Array, "B A"]  # of the exit before; NaN if there is none
  held: Int[Array, " B"]  # exit kept from an earlier step; 0 decides anew

  @classmethod
  def start(cls, rows: int, actions: int) -> "Control":
    """The first control step, without an action before the first exit."""
    action = jnp.full((rows, actions), jnp.nan)
    return cls(action, jnp.zeros(rows, jnp.int32))


def hold(
  exit: Int[Array, " B"],
  step: Int[Array, ""] | int,
  steps_per_stage: Int[Array, ""] | int,
) -> Int[Array, " B"]:
  """`held` for the control step after `step`, which left at `exit`.

  The exit is decided anew at every `steps_per_stage`-th step from 0.
  """
  return jnp.where((step + 1) % steps_per_stage == 0, 0, exit)


def action_exit(
  l,
  action: Float[Array, "B A"],
  pooled,
  memory: Control,
  *,
  thresholds: Float[Array, " K"],
  max_layer: Int[Array, ""] | int,
) -> tuple[Bool[Array, " B"], Control]:
  """The rule of a `Classifier` whose outputs are actions.

  Args:
    thresholds: eta, one per exit; below 0 never leaves there (dynamic).
    max_layer: the last layer that anybody runs, 1..K (dynamic).
  """
  del pooled
  settled = delta(memory.action, action) <= thresholds[l]
  due = jnp.where(memory.held > 0, memory.held <= l + 1, settled)
  return due | (l + 1 >= max_layer), Control(action, memory.held)


def solve_action_thresholds(
  actions: Float[Array, "K n A"],
  fractions: np.ndarray,
  before: Float[Array, "n A"] | None = None,
) -> np.ndarray:
  """Thresholds f32[K] that spread calibration samples over the exits as wished.

  Args:
    actions: of every sample at every exit.
    fractions: wished share per exit, as from `exit_fractions`.
    before: the action before the first exit; if there is none, nobody can
      leave there: `fractions[0]` must be 0.
  """
  if before is None:
    if fractions[0] > 0:
      raise ValueError(f"without `before` exit 1 takes no one; {fractions=}.")
    before = jnp.full_like(actions[0], jnp.inf)
  change = delta(jnp.concatenate([before[None], actions[:-1]]), actions)
  return -solve_exit_thresholds(-np.asarray(change).T, fractions)


def random_exits(
  states: Float[Array, "K B S D"], key: Key[Array, ""]
) -> Float[Array, "B S D"]:
  """Of each row and control step, the state of a uniformly random exit."""
  exits, *lead, _ = states.shape
  chosen = jax.random.randint(key, lead, 0, exits)
  return jnp.take_along_axis(states, chosen[None, ..., None], axis=0)[0]


def deer_loss(
  every_exit: Float[Array, "K ..."], random_exit: Float[Array, "..."]
) -> Float[Array, ""]:
  """Action loss on random exits, and the mean of those of each exit alone."""
  return random_exit.mean() + every_exit.mean()
