# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Depths: more layers, most of them for an eighth of the bytes.

Ten layers, of which every other one takes 12.5 % of the bytes, against six
dense ones, at equal FLOPs of training (not of parameters).  Measured as it
generates: a predictor decides instead of the top-k, which looks ahead.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from adaptivejax.core import top_k
from adaptivejax.core.losses import cross_entropy
from adaptivejax.methods.depth import MixtureOfDepths
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import Group
from adaptivejax.nn.stack import layer_at, layer_count
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import language_modeling
from benchmarks.headlines import Headline
from benchmarks.headlines.beds import (
  DATA,
  MODEL,
  OPTIMIZER,
  STEPS,
  bits_per_byte,
  byte_lm,
  fit,
  texts,
)

PAPER = (
  "At equal training FLOPs the loss of the dense model or less (unverified)"
)
DEEP, CAPACITY = dataclasses.replace(MODEL, layers=10), 0.125
MARGIN = 0.02  # nats


def measure(quick: bool) -> Headline:
  dense, routed = byte_lm("dense", quick), fit(_config(), quick)
  text = texts(8 if quick else 400)
  right, asked = map(float, _predictor(routed, text))
  figures = {
    "dense_bits": float(bits_per_byte(dense, text)),
    "bits": float(bits_per_byte(routed, text)),
    "bits_top_k": float(_top_k_bits(routed, text)),
    "steps": _config().steps,
    "training_flops_share": _config().steps * _price() / STEPS,
    "predictor": right,
    "share": asked,
  }
  cost = jax.jit(lambda m: m(text[:, :-1]).cost.spent)
  figures["flops_share"] = float(cost(routed) / cost(dense))
  gap = figures["bits"] - figures["dense_bits"]
  words = (
    f"{figures['bits']:.3f} bits per byte against {figures['dense_bits']:.3f}"
    f" of 6 dense layers, at {figures['training_flops_share']:.0%} of their"
    f" FLOPs in training and {figures['flops_share']:.0%} per pass; by the"
    f" top-k, which looks ahead, {figures['bits_top_k']:.3f}. The predictor is"
    f" right of {right:.1%} of bytes and selects {asked:.1%}"
  )
  return Headline(words, figures, bool(gap <= MARGIN / math.log(2)))


def _layer(rngs: nnx.Rngs) -> Group:
  whole, some = (decoder_block(DEEP, rngs) for _ in range(2))
  routed = MixtureOfDepths(some, DEEP.features, capacity=CAPACITY, rngs=rngs)
  return Group([whole, routed])


def _build(rngs: nnx.Rngs) -> DecoderLM:
  return DecoderLM(DEEP, layer=_layer, rngs=rngs)


def _price() -> float:
  """FLOPs of a training step, as a share of the dense model's."""

  def spent(model):
    text = jnp.zeros((1, DATA.context), jnp.int32)
    return model(text, key=jax.random.key(0)).cost.spent

  make = lambda rngs: DecoderLM(MODEL, rngs=rngs)
  routed, dense = (jax.jit(spent)(f(nnx.Rngs(0))) for f in (_build, make))
  return float(routed / dense)


def _config() -> TrainConfig:
  steps = round(STEPS / _price())
  return TrainConfig(
    name="headlines/mixture_of_depths",
    build=_build,
    loss=language_modeling,
    data=DATA,
    optimizer=OPTIMIZER,
    steps=steps,
    eval_every=steps,
    checkpoint_every=500,
    log_every=50,
    keep=1,
  )


@jax.jit
def _top_k_bits(model, text):
  """Bits per byte as in training."""
  out = model(text[:, :-1], key=jax.random.key(0))
  return cross_entropy(out.logits, text[:, 1:]).mean() / jnp.log(2)


@jax.jit
def _predictor(model, text):
  """How often it says what the top-k says, and how often "selected"."""
  x, tokens = model.embed(text), text.shape[1]
  place = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), text.shape)
  right, asked = [], []
  for i in range(layer_count(model.layers)):
    whole, routed = layer_at(model.layers, i).layers
    x = whole(x, place)[0]
    said = routed.decide(x)
    k = math.ceil(CAPACITY * tokens)
    right.append((said == top_k(routed.router(x)[..., 0], k)).mean())
    asked.append(said.mean())
    x = routed(x, place)[0]
  return jnp.stack(right).mean(), jnp.stack(asked).mean()
