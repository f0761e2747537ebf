# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Recursions: half the parameters at equal training FLOPs.

Between a first and a last layer of its own, one shared layer recurs up to three
times, on 3/3, 2/3 and 1/3 of the bytes: work of 4 layers, parameters of 3.
Trained for 6/4 of the steps of the dense model of 6 layers.
"""

import dataclasses
import math

import jax
from flax import nnx

from adaptivejax.methods.depth import MixtureOfRecursions
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import Group
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
  "At equal training FLOPs about half the parameters reach the loss of the"
  " vanilla model, or better (unverified)"
)
RECURSIVE = dataclasses.replace(MODEL, layers=5)
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
  holds = gap <= MARGIN / math.log(2)
  value = {name: f"{x:.3f}" for name, x in figures.items()}
  text = (
    f"{value['bits']} bits per byte against {value['dense_bits']} of 6 dense"
    f" layers, with {figures['parameters_share']:.0%} of their parameters and"
    f" {figures['flops_share']:.0%} of their FLOPs at inference"
  )
  return Headline(text, figures, holds)


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
