# SPDX-License-Identifier: Apache-2.0
"""Duo-LLM: the oracle's one big layer against big layers everywhere.

A byte language model of six layers, each with a small feed-forward layer of a
quarter of the width, is trained with random ways (stage 1); then all 729
patterns are tried on held-out text.
"""

import jax
import numpy as np
from flax import nnx

from adaptivejax.methods.depth import DuoMlp, pattern_losses, patterns
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import Mlp
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import language_modeling
from benchmarks.headlines import Headline
from benchmarks.headlines.beds import DATA, MODEL, OPTIMIZER, fit, texts

PAPER = (
  "By an oracle's choice, a big module in just one layer beats big modules in"
  " every layer"
)


def measure(quick: bool) -> Headline:
  model, text = fit(_config(), quick), texts(2 if quick else 24)
  table = patterns(MODEL.layers)
  if quick:
    table = table[::7]
  bits = np.asarray(jax.jit(pattern_losses)(model, text, table)) / np.log(2)
  table = np.asarray(table)
  big, small = (table == 2).sum(1), (table == 1).sum(1)
  one = big == 1
  only = one & (small == MODEL.layers - 1)
  rng = np.random.default_rng(0)
  drawn = [rng.choice(len(table), min(100, len(table))) for _ in range(20)]
  figures = {
    "all_big": float(bits[big.argmax()].mean()),
    "one_big_fixed": float(bits[one].mean((1, 2)).min()),
    "one_big_oracle": float(bits[one].min(0).mean()),
    "one_big_rest_small_oracle": float(bits[only].min(0).mean()),
    "random_100_oracle": float(np.mean([bits[i].min(0).mean() for i in drawn])),
    "oracle": float(bits.min(0).mean()),
  }
  value = {name: f"{x:.2f}" for name, x in figures.items()}
  text = (
    f"bits per byte: all big {value['all_big']}; the oracle, byte by byte, with"
    f" one big layer {value['one_big_oracle']} (the others small, none skipped:"
    f" {value['one_big_rest_small_oracle']}), of 100 random patterns"
    f" {value['random_100_oracle']}, of all 729 {value['oracle']}. One pattern"
    f" with one big layer for all bytes: {value['one_big_fixed']}; the gain is"
    " that of knowing the answer"
  )
  return Headline(text, figures, figures["one_big_oracle"] < figures["all_big"])


def _config() -> TrainConfig:
  return TrainConfig(
    name="headlines/duo_llm",
    build=lambda rngs: DecoderLM(MODEL, layer=_layer, rngs=rngs),
    loss=language_modeling,
    data=DATA,
    optimizer=OPTIMIZER,
    steps=800,
    eval_every=800,
    checkpoint_every=400,
    log_every=50,
    keep=1,
  )


def _layer(rngs: nnx.Rngs):
  width = MODEL.features
  small = Mlp(width, MODEL.hidden // 4, rngs=rngs)
  big = Mlp(width, MODEL.hidden, rngs=rngs)
  duo = DuoMlp(small, big, width, random=True, rngs=rngs)
  return decoder_block(MODEL, rngs, duo)
