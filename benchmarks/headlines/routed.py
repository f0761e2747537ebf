# SPDX-License-Identifier: Apache-2.0
"""What headlines of experts over devices share: a small model that routes.

Axes: N windows, S bytes, L layers, E experts.
"""

import functools

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32

from adaptivejax.core import expert_load
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import (
  MixtureOfExperts,
  Mlp,
  Router,
  Routing,
  routing_trace,
  stacked,
)
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import language_modeling
from benchmarks.headlines.beds import DATA, OPTIMIZER, fit

MODEL = DecoderConfig(layers=6, features=64, heads=4, kv_heads=4)
EXPERTS, HIDDEN, STEPS, BALANCE = 8, 128, 600, 0.01


class TopOne(nnx.Module):
  """The best of the experts, with a balance loss (Fedus et al., 2021)."""

  def __init__(self, rngs: nnx.Rngs):
    self.scorer = Router(MODEL.features, EXPERTS, rngs=rngs)

  def __call__(self, x, live=None, key=None) -> Routing:
    gates = jax.nn.softmax(self.scorer(x))
    weights, experts = jax.lax.top_k(gates, 1)
    wanted = expert_load(experts, EXPERTS) / experts.size
    mean = gates.reshape(-1, EXPERTS).mean(0)
    penalty = BALANCE * EXPERTS * (wanted * mean).sum()
    return Routing(experts, weights, penalty, 0 * penalty)


def _layer(rngs: nnx.Rngs):
  expert = lambda rngs: Mlp(MODEL.features, HIDDEN, rngs=rngs)
  experts = stacked(expert, EXPERTS, rngs)
  return decoder_block(MODEL, rngs, MixtureOfExperts(TopOne(rngs), experts))


@functools.cache
def routed_lm(quick: bool = False) -> DecoderLM:
  """A byte language model of six layers, each of eight experts."""
  config = TrainConfig(
    name="headlines/routed",
    build=lambda rngs: DecoderLM(MODEL, layer=_layer, rngs=rngs),
    loss=language_modeling,
    data=DATA,
    optimizer=OPTIMIZER,
    steps=STEPS,
    eval_every=STEPS,
    checkpoint_every=300,
    log_every=50,
    keep=1,
  )
  return fit(config, quick)


def trace_of(model: DecoderLM, text: Int32[Array, "N S"]) -> np.ndarray:
  """The expert of every byte in every layer, i32[N S, L]."""
  notes = jax.jit(lambda m: m(text, stack=routing_trace).notes)(model)
  return np.asarray(notes).reshape(len(notes), -1).T
