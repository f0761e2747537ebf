# SPDX-License-Identifier: Apache-2.0
"""AdamW with warm-up, cosine decay, clipping and a weight-decay mask.

Parameters named `load_bias` are not AdamW's: they balance the load of experts
(Wang et al., 2024, https://arxiv.org/abs/2408.15664), their gradient is by how
much each expert's load is off, and they take steps of a fixed size against its
sign, apart from all clipping, momentum, decay and schedule.

The learning rate rises in a line to its peak over `warmup` steps and falls
along a half cosine to `floor` times the peak at the last step.  Gradients
accumulate over equal parts of a batch inside the training step
(`training.step`), so a step here is always one update.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

NO_DECAY = ("bias", "scale", "load_bias")
BALANCE = "load_bias"


@dataclass(frozen=True)
class OptimizerConfig:
  """Settings of AdamW; all static."""

  learning_rate: float = 1e-3
  """Peak learning rate."""

  warmup: int = 50
  """Steps of linear warm-up."""

  floor: float = 0.1
  """Last learning rate as a share of the peak."""

  weight_decay: float = 0.1
  """Decoupled weight decay of all but biases and scales."""

  clip: float = 1.0
  """Largest global norm of the gradient."""

  b1: float = 0.9
  """Decay of the mean of the gradients."""

  b2: float = 0.95
  """Decay of the mean of their squares."""

  balance_rate: float = 1e-3
  """Step of the parameters that balance the load of experts."""

  accumulate: int = 1
  """Parts of a batch whose gradients are accumulated, to save memory."""

  def __post_init__(self):
    """Refuses settings outside their range."""
    for name in ("learning_rate", "clip"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")
    for name in ("balance_rate", "weight_decay"):
      if not getattr(self, name) >= 0:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
    if not 0 <= self.floor <= 1:
      raise ValueError(f"floor={self.floor} must be a share, in [0, 1]")
    if self.accumulate < 1 or self.warmup < 0:
      raise ValueError(
        f"accumulate={self.accumulate} must be at least 1 and"
        f" warmup={self.warmup} at least 0"
      )


def learning_rate(config: OptimizerConfig, steps: int) -> Callable:
  """The learning rate after so many of `steps` updates."""
  warmup = min(config.warmup, steps - 1)
  return optax.warmup_cosine_decay_schedule(
    init_value=config.learning_rate / (warmup + 1),
    peak_value=config.learning_rate,
    warmup_steps=warmup,
    decay_steps=steps,
    end_value=config.learning_rate * config.floor,
  )


def decays(params: PyTree) -> PyTree:
  """True for each parameter that weight decay shrinks.

  By name, not by rank: in a stack of layers a bias is a matrix.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key not in NO_DECAY, params
  )


def make_optimizer(
  config: OptimizerConfig, steps: int
) -> optax.GradientTransformation:
  """The optimizer of a run of `steps` updates, over nested dicts of arrays."""
  adamw = optax.chain(
    optax.clip_by_global_norm(config.clip),
    optax.adamw(
      learning_rate(config, steps),
      b1=config.b1,
      b2=config.b2,
      weight_decay=config.weight_decay,
      mask=decays,
    ),
  )
  return _but_balance(adamw, optax.sign_sgd(config.balance_rate))


def balances(params: PyTree) -> PyTree:
  """True for each parameter that balances the load of experts; by name."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == BALANCE, params
  )


def _but_balance(
  most: optax.GradientTransformation, balance: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`most` of the parameters by one optimizer, those that balance by another.

  `balance` has no state, so the state is that of `most`, which sees zeros.
  """

  def update(updates, state, params=None):
    own = balances(updates)
    zero = lambda b, g: jnp.zeros_like(g) if b else g
    others, state = most.update(jax.tree.map(zero, own, updates), state, params)
    signed, _ = balance.update(updates, balance.init(updates), params)
    pick = lambda b, s, o: s if b else o
    return jax.tree.map(pick, own, signed, others), state

  return optax.GradientTransformation(most.init, update)
