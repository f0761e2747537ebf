# SPDX-License-Identifier: Apache-2.0
"""Law: what training says of the experts is what they were given."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.cost import Cost, Signals
from adaptivejax.methods.experts import SwitchRouter
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import MixtureOfExperts, Mlp, stacked
from adaptivejax.training.tasks import balance_metrics, language_modeling

CONFIG = DecoderConfig(
  vocab=13, layers=2, features=8, hidden=16, heads=2, kv_heads=1
)
BATCH = jnp.asarray(np.random.default_rng(0).integers(0, 13, (3, 9)))


def said(*loads, dropped=0.0):
  signals = Signals.none()._replace(load=tuple(map(jnp.float32, loads)))
  cost = Cost.zero()._replace(dropped=jnp.float32(dropped))
  return types.SimpleNamespace(signals=signals, cost=cost)


def test_imbalance_is_the_fullest_over_the_mean_of_every_layer():
  layers = [[4, 4, 4, 4], [16, 0, 0, 0]]  # 1 and 4
  others = [[1, 3], [0, 0]]  # 1.5, and a layer that ran nothing: 0
  found = balance_metrics(said(layers, others))
  assert found["imbalance"] == pytest.approx((1 + 4 + 1.5 + 0) / 4)
  assert found["dropped"] == 0


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
  (load,) = out.signals.load
  asked = 2 * 3 * 8  # layers, rows, tokens
  assert load.shape == (2, 4)
  assert metrics["dropped"] == pytest.approx(1 - load.sum() / asked)
  assert 0.4 < metrics["dropped"] < 1
  worst = (load.max(1) / load.mean(1)).mean()
  assert metrics["imbalance"] == pytest.approx(worst)
  assert loss > metrics["nats"]
