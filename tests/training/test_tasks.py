# SPDX-License-Identifier: Apache-2.0
"""Law: what training says of the experts is what they were given."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.cost import Cost, Signals
from adaptivejax.core.dispatch import expert_load
from adaptivejax.core.router_losses import excess_load
from adaptivejax.core.select import best
from adaptivejax.methods.experts import SwitchRouter
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import MixtureOfExperts, Mlp, Routing, stacked
from adaptivejax.training import OptimizerConfig, step
from adaptivejax.training.optimizer import make_optimizer
from adaptivejax.training.tasks import balance_metrics, language_modeling
from tests.training import tiny

CONFIG = DecoderConfig(
  vocab=13, layers=2, features=8, hidden=16, heads=2, kv_heads=1
)
BATCH = jnp.asarray(np.random.default_rng(0).integers(0, 13, (3, 9)))


def said(*loads, dropped=0.0, k=1):
  each = tuple(jnp.full((len(load), 1, 1), float(k)) for load in loads)
  load = tuple(map(jnp.float32, loads))
  signals = Signals.none()._replace(load=load, choices=each)
  cost = Cost.zero()._replace(dropped=jnp.float32(dropped))
  return types.SimpleNamespace(signals=signals, cost=cost)


def test_imbalance_is_the_fullest_over_the_mean_of_every_layer():
  layers = [[4, 4, 4, 4], [16, 0, 0, 0]]  # 1 and 4
  others = [[1, 3], [0, 0]]  # 1.5, and a layer that ran nothing: 0
  found = balance_metrics(said(layers, others))
  assert found["imbalance"] == pytest.approx((1 + 4 + 1.5 + 0) / 4)
  assert found["dropped"] == 0


def test_dead_experts_have_next_to_no_load():
  layers = [[100, 0, 100, 0], [100, 100, 100, 100]]
  others = [[100, 1], [0, 0]]  # 1 is 2 % of the mean; nothing ran: none died
  assert balance_metrics(said(layers, others))["dead"] == 2 / 12
  few = [[1000, 4]]  # 0.8 % of the mean
  assert balance_metrics(said(few))["dead"] == 1 / 2


@pytest.mark.parametrize(
  ("load", "k", "wanted"),
  [
    ([[5, 5, 5, 5]], 1, 0),
    ([[20, 0, 0, 0]], 1, 1),
    ([[10, 10, 0, 0]], 2, 1),
    ([[10, 10, 0, 0]], 1, 2 / 3),  # two of four: 4 - 2 of 4 - 1
    ([[5, 5, 5, 5], [0, 9, 0, 0]], 1, 1),  # the worst layer
    ([[5, 5]], 2, 0),  # all of them, always: nothing to choose
    ([[0, 0, 0]], 1, 0),  # nothing ran
  ],
)
def test_collapse_is_how_far_the_load_is_from_even(load, k, wanted):
  found = balance_metrics(said(load, k=k))["collapse"]
  assert found == pytest.approx(wanted, abs=1e-6)


def test_dropped_is_the_share_of_what_was_asked_for():
  assert balance_metrics(said([[6, 3]], dropped=3.0))["dropped"] == 0.25
  assert balance_metrics(said([[0, 0]]))["dropped"] == 0


def test_a_model_without_experts_says_nothing_of_them():
  model = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
  _, metrics = language_modeling(model, BATCH, jax.random.key(0))
  assert set(metrics) == {"nats", "share"}


def test_training_reports_what_capacity_dropped():
  def layer(rngs):
    experts = stacked(lambda r: Mlp(8, 8, rngs=r), 4, rngs)
    router = SwitchRouter(8, 4, capacity_factor=0.5, rngs=rngs)
    return decoder_block(CONFIG, rngs, MixtureOfExperts(router, experts))

  model = DecoderLM(CONFIG, layer=layer, rngs=nnx.Rngs(0))
  loss, metrics = language_modeling(model, BATCH, jax.random.key(0))
  out = model(BATCH[:, :-1], key=jax.random.key(0))
  (given,) = out.signals.load
  asked = 2 * 3 * 8  # layers, rows, tokens
  assert given.shape == (2, 4)
  assert metrics["dropped"] == pytest.approx(1 - given.sum() / asked)
  assert 0.4 < metrics["dropped"] < 1
  worst = (given.max(1) / given.mean(1)).mean()
  assert metrics["imbalance"] == pytest.approx(worst)
  assert loss > metrics["nats"]


class _Skewed(nnx.Module):
  """Prefers the first expert, but for what balances it."""

  def __init__(self, rngs):
    self.gate = nnx.Linear(8, 4, use_bias=False, rngs=rngs)
    self.load_bias = nnx.Param(jnp.zeros(4))

  def __call__(self, x, live=None, key=None):
    scores = jax.nn.sigmoid(self.gate(x) + jnp.array([3.0, 0.0, 0.0, 0.0]))
    experts = best(scores + self.load_bias.get_value(), 1)
    taken = expert_load(experts, 4) / experts.size
    excess = excess_load(self.load_bias.get_value(), taken - taken.mean())
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    return Routing(experts, weights, excess, jnp.float32(0))


def test_balancing_without_a_loss_evens_the_load():
  """The whole path: penalty, gradient, the optimizer's rule for `load_bias`."""

  def layer(rngs):
    experts = stacked(lambda r: Mlp(8, 8, rngs=r), 4, rngs)
    return decoder_block(CONFIG, rngs, MixtureOfExperts(_Skewed(rngs), experts))

  rate = OptimizerConfig(learning_rate=1e-4, warmup=0, balance_rate=0.02)
  config = tiny.config(
    "unused",
    build=lambda rngs: DecoderLM(CONFIG, layer=layer, rngs=rngs),
    loss=language_modeling,
    optimizer=rate,
    steps=40,
  )
  join, params = step.split(config.build(nnx.Rngs(0)))
  optimizer = make_optimizer(config.optimizer, config.steps)
  state = step.TrainState(jnp.int32(0), params, optimizer.init(params))
  update = step.make_step(config, join, optimizer)
  seen = []
  for _ in range(40):
    state, metrics = update(state, BATCH, jax.random.key(0))
    seen.append(float(metrics["imbalance"]))
  assert seen[0] > 3 and np.mean(seen[-5:]) < 2
  balance = state.params["layers"]["mlp"]["router"]["load_bias"]
  steps = np.asarray(balance) / 0.02
  np.testing.assert_allclose(steps, steps.round(), atol=1e-3)
  assert (steps[:, 0] < -5).all()
