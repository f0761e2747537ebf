# SPDX-License-Identifier: Apache-2.0
"""Lightning attention: time per token as texts grow, and loss beside softmax.

The time is that of a training step of one attention (forward and backward), in
turn with the same attention that looks at all keys.  The loss is that of two
byte models which differ in how they look, after as many steps on the same text.
"""

import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptivejax.core.losses import cross_entropy
from adaptivejax.methods.attention import LightningAttention
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import Attention
from adaptivejax.report.clock import interleave
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import language_modeling
from benchmarks.headlines import Headline
from benchmarks.headlines.beds import (
  DATA,
  MODEL,
  OPTIMIZER,
  STEPS,
  byte_lm,
  fit,
  texts,
)

PAPER = (
  "Training speed stays constant as sequences grow, at fixed memory, where"
  " softmax attention slows down; language modelling on par with transformers"
  " (unverified)"
)
FEATURES, HEADS = 128, 2
CONSTANT = 1.15
"""Most that the time of a token may grow by from T to 4T."""


def measure(quick: bool) -> Headline:
  lengths = (64, 128, 256) if quick else (1024, 2048, 4096)
  ours, softmax = _growth(lengths, seconds=2.0 if quick else 45.0)
  dense, linear = byte_lm("dense", quick), lightning_lm(quick)
  text = texts(20 if quick else 400)
  lost = np.asarray(_nats(linear, text) - _nats(dense, text)) / math.log(2)
  figures = {
    "growth_2": ours[1],
    "growth_4": ours[2],
    "softmax_growth_2": softmax[1],
    "softmax_growth_4": softmax[2],
    "bits": float(_nats(linear, text).mean()) / math.log(2),
    "dense_bits": float(_nats(dense, text).mean()) / math.log(2),
    "lost": float(lost.mean()),
    "standard_error": float(lost.std() / math.sqrt(len(lost))),
  }
  words = (
    f"a training step of one attention takes {ours[1]:.2f} and {ours[2]:.2f}"
    f" times as long per token at {lengths[1]} and {lengths[2]} tokens as at"
    f" {lengths[0]} (softmax {softmax[1]:.2f} and {softmax[2]:.2f}); after as"
    f" many steps {figures['bits']:.3f} bits per byte against"
    f" {figures['dense_bits']:.3f} (lost {figures['lost']:.3f} ±"
    f" {figures['standard_error']:.3f}), at a context of {DATA.context}"
  )
  near = figures["lost"] < 0.02 * figures["dense_bits"]
  return Headline(words, figures, bool(ours[2] < CONSTANT and near))


def lightning_lm(quick: bool) -> DecoderLM:
  """As `byte_lm("dense")`, but for its look."""

  def layer(rngs):
    look = LightningAttention(
      MODEL.features, MODEL.heads, MODEL.layers, rngs=rngs
    )
    return decoder_block(MODEL, rngs, look=look)

  return fit(
    TrainConfig(
      name="headlines/lightning",
      build=lambda rngs: DecoderLM(MODEL, layer=layer, rngs=rngs),
      loss=language_modeling,
      data=DATA,
      optimizer=OPTIMIZER,
      steps=STEPS,
      eval_every=STEPS,
      checkpoint_every=500,
      log_every=50,
      keep=1,
    ),
    quick,
  )


def _growth(lengths, seconds) -> list[list[float]]:
  """Time per token relative to the shortest: for each module, each length."""
  rngs = nnx.Rngs(0)
  look = LightningAttention(FEATURES, HEADS, rngs=rngs)
  modules = [
    Attention(FEATURES, HEADS, look=look, rngs=rngs),
    Attention(FEATURES, HEADS, rngs=rngs),
  ]
  calls = [_step(module, length) for module in modules for length in lengths]
  times = interleave(calls, seconds=seconds, least=3)
  count, out = len(lengths), []
  for first in range(0, len(times), count):
    base = times[first]
    out.append(
      [
        statistics.median(
          t / length / (b / lengths[0]) for t, b in zip(each, base)
        )
        for each, length in zip(times[first : first + count], lengths)
      ]
    )
  return out


def _step(module, length):
  x = jax.random.normal(jax.random.key(0), (1, length, FEATURES))
  positions = jnp.arange(length)[None]
  loss = lambda module, x: jnp.sin(module(x, positions)[0]).sum()
  run = jax.jit(jax.grad(loss, (0, 1)))
  call = functools.partial(run, module, x)
  return lambda i: call()


@jax.jit
def _nats(model, text):
  """Of each window."""
  out = model(text[:, :-1])
  return cross_entropy(out.logits, text[:, 1:]).mean(1)
