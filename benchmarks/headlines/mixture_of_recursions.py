# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Recursions: half the parameters at equal training FLOPs.

Between a first and a last layer of its own, one shared layer recurs up to three
times on 3/3, 2/3 and 1/3 of the bytes: 4 layers' work with 3 layers' parameters.
Trained for 6/4 of the steps of the dense model of 6 layers.
"""

import jax
from flax import nnx

from adaptivejax.methods.depth import MixtureOfRecursions
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Group
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import language_modeling
from benchmarks.headlines import Headline
from benchmarks.headlines.beds import (
  DATA,
  OPTIMIZER,
  STEPS,
  bits_per_byte,
  byte_lm,
  fit,
  texts,
)

PAPER = (
  "At equal training FLOPs about half the parameters reach the loss of the"
  " vanilla model, or better (unverified)"
)
RECURSIVE = DecoderConfig(
  layers=5, features=64, hidden=256, heads=4, kv_heads=4
)
MARGIN = 0.03  # nats, 0.043 bits


def measure(quick: bool) -> Headline:
  dense, recursive = byte_lm("dense", quick), fit(_config(), quick)
  text = texts(8 if quick else 400)
  cost = jax.jit(lambda m: m(text[:, :-1]).cost)
  figures = {
    "dense_bits": float(bits_per_byte(dense, text)),
    "bits": float(bits_per_byte(recursive, text)),
    "parameters_share": _size(recursive.layers) / _size(dense.layers),
    "flops_share": float(cost(recursive).spent / cost(dense).spent),
  }
  gap = figures["bits"] - figures["dense_bits"]
  holds = gap <= MARGIN / jax.numpy.log(2).item()
  return Headline(
    f"{figures['bits']:.3f} bits per byte against {figures['dense_bits']:.3f} of"
    f" 6 dense layers, with {figures['parameters_share']:.0%} of their parameters"
    f" and {figures['flops_share']:.0%} of the FLOPs when generating",
    figures,
    holds,
  )


def _size(tree) -> int:
  return sum(a.size for a in jax.tree.leaves(tree))


def _config() -> TrainConfig:
  steps = STEPS * 6 // 4
  return TrainConfig(
    name="headlines/mixture_of_recursions",
    build=lambda rngs: DecoderLM(RECURSIVE, layer=_layers, rngs=rngs),
    loss=language_modeling,
    data=DATA,
    optimizer=OPTIMIZER,
    steps=steps,
    eval_every=steps,
    checkpoint_every=750,
    log_every=50,
    keep=1,
  )


def _layers(rngs: nnx.Rngs) -> Group:
  """The first layer, the one that recurs, and the last."""
  first, shared, last = (decoder_block(RECURSIVE, rngs) for _ in range(3))
  recurring = MixtureOfRecursions(shared, RECURSIVE.features, rngs=rngs)
  return Group([first, recurring, last])
