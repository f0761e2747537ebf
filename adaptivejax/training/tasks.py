# SPDX-License-Identifier: Apache-2.0
"""What to minimise: losses for `TrainConfig.loss`, in nats per token.

Bind settings with `functools.partial`.

Axes: B batch, S context + 1: inputs and their next tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from adaptivejax.core.budget import budget_loss
from adaptivejax.core.losses import cross_entropy, exit_cross_entropy
from adaptivejax.methods.depth.layer_skip import (
  dropout_rates,
  exit_weights,
  layer_dropout,
)
from adaptivejax.methods.depth.sorted_fine_tuning import sorted_loss
from adaptivejax.nn.stack import every_layer, layer_count

Loss = tuple[Float[Array, ""], dict[str, Array]]


def language_modeling(
  model,
  batch: Int[Array, "B S"],
  key: Key[Array, ""],
  budget: Float[Array, ""] | None = None,
  *,
  budget_weight: float = 0.1,
) -> Loss:
  """Cross-entropy, plus what the adaptive parts ask for.

  Args:
    model: a `DecoderLM`, called in its training form.
    batch: tokens.
    key: noise of the step.
    budget: target for the soft share of compute; no budget loss without.
    budget_weight: of the distance from it (static).
  """
  out = model(batch[:, :-1], key=key)
  nats = cross_entropy(out.logits, batch[:, 1:]).mean()
  loss = nats + out.signals.penalty
  if budget is not None:
    loss += budget_weight * budget_loss(out.signals.share, budget)
  metrics = {"nats": nats, "share": out.signals.share}
  return loss, metrics | balance_metrics(out)


DEAD = 0.01
"""An expert with less than this of the mean load is dead."""


def balance_metrics(out) -> dict[str, Array]:
  """How evenly the experts of a model are loaded; nothing if it has none.

  Returns:
    `imbalance`, the load of the fullest expert over the mean, mean over layers;
    `dropped`, the share of choices that no expert had room for;
    `dead`, the share of experts with next to no load;
    `collapse` of the worst layer, from 0, all experts are loaded alike, to 1,
    all items go to the same ones.
  """
  if not out.signals.load:
    return {}
  worst = [
    load.max(-1) / jnp.maximum(load.mean(-1), 1e-9) for load in out.signals.load
  ]
  dead = [l < DEAD * l.mean(-1, keepdims=True) for l in out.signals.load]
  collapse = map(_collapse, out.signals.load, out.signals.choices)
  served = sum(load.sum() for load in out.signals.load)
  asked = served + out.cost.dropped
  join = lambda values: jnp.concatenate([jnp.ravel(v) for v in values])
  return {
    "imbalance": join(worst).mean(),
    "dropped": out.cost.dropped / jnp.maximum(asked, 1),
    "dead": join(dead).mean(dtype=jnp.float32),
    "collapse": join(collapse).max(),
  }


def _collapse(
  load: Float[Array, "*L E"], choices: Float[Array, "*L B T"]
) -> Float[Array, "*L"]:
  """(E - e) / (E - K), with e = exp(entropy of the load) experts in use.

  e is K, the choices of an item, where all items go to the same experts.
  """
  count, total = load.shape[-1], load.sum(-1)
  p = load / jnp.maximum(total, 1e-9)[..., None]
  used = jnp.exp(jax.scipy.special.entr(p).sum(-1))
  served = jnp.maximum((choices > 0).sum((-2, -1)), 1)
  spare = count - choices.sum((-2, -1)) / served
  chosen = (spare > 0) & (total > 0)  # else there was nothing to choose
  found = (count - used) / jnp.where(chosen, spare, 1)
  return jnp.where(chosen, jnp.clip(found, 0, 1), 0)


def sorted_language_modeling(
  model,
  batch: Int[Array, "B S"],
  key: Key[Array, ""],
  *,
  exits: tuple[int, ...] | None = None,
) -> Loss:
  """Cross-entropy after every layer, weighted by its depth, so that each is an
  exit (`sorted_loss`; the weights of CALM).

  Args:
    model: a `DecoderLM`.
    batch: tokens.
    key: noise of the step.
    exits: depths that may be exits; all if not given (static).
  """
  out = model(batch[:, :-1], stack=every_layer, key=key)
  exits = exits or tuple(range(1, out.hidden.shape[0] + 1))
  weights = tuple(float(n) for n in exits)
  targets = batch[:, 1:]
  loss = sorted_loss(
    out.hidden, model.readout, targets, exits=exits, weights=weights
  )
  nats = cross_entropy(out.logits, targets).mean()
  metrics = {"nats": nats, "share": jnp.float32(1)}
  return loss + out.signals.penalty, metrics | balance_metrics(out)


def layer_skip_language_modeling(
  model,
  batch: Int[Array, "B S"],
  key: Key[Array, ""],
  *,
  dropout: float = 0.1,
  exit_scale: float = 0.2,
  every: int = 1,
) -> Loss:
  """The training of LayerSkip: layer dropout and a loss after every layer.

  Args:
    model: a `DecoderLM`.
    batch: tokens.
    key: noise of the step.
    dropout: how often the last layer is dropped, the first never is (static).
    exit_scale: how much the early exits count (static).
    every: one exit out of so many per step (static).
  """
  total = layer_count(model.layers)
  drop, choose = jax.random.split(key)
  stack = functools.partial(layer_dropout, rates=dropout_rates(total, dropout))
  out = model(batch[:, :-1], stack=stack, key=drop)
  weights = exit_weights(total, exit_scale, every=every, key=choose)
  targets = batch[:, 1:]
  loss = exit_cross_entropy(out.hidden, model.readout, targets, weights)
  nats = cross_entropy(out.logits, targets).mean()
  metrics = {"nats": nats, "share": out.cost.share}
  return loss + out.signals.penalty, metrics | balance_metrics(out)
