# SPDX-License-Identifier: Apache-2.0
"""What headlines share: small models, trained once, and small real data.

  python -m benchmarks.headlines.beds    trains the models, says how good

A model is kept in runs/headlines/NAME, where a second call finds it.

Axes: N windows or images, S bytes of a window, L layers, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int32

from adaptivejax.core.losses import accuracy, cross_entropy
from adaptivejax.methods.experts import MixtralRouter
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import (
  Block,
  MixtureOfExperts,
  Mlp,
  every_layer,
  plain,
  stacked,
)
from adaptivejax.training import (
  DataConfig,
  OptimizerConfig,
  TrainConfig,
  load_corpus,
  train,
)
from adaptivejax.training.data import windows
from adaptivejax.training.tasks import (
  language_modeling,
  layer_skip_language_modeling,
  sorted_language_modeling,
)

OUT = Path("runs/headlines")
MODEL = DecoderConfig(layers=6, features=64, hidden=256, heads=4, kv_heads=4)
DATA = DataConfig(context=64, batch=24)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.0)
STEPS = 1500
EXPERTS, TOP_K, BALANCE = 8, 2, 0.01
LOSSES = {
  "dense": language_modeling,
  "experts": language_modeling,
  "exits": sorted_language_modeling,
  "layer_skip": layer_skip_language_modeling,
}
PLAIN = jax.tree_util.Partial(plain)
Kind = Literal["dense", "exits", "layer_skip", "experts"]


@functools.cache
def byte_lm(kind: Kind, quick: bool = False) -> DecoderLM:
  """A byte-level language model of Python's standard library.

  Args:
    kind: "dense" is trained on the loss after the last layer only, "exits" on
      the losses after every layer, weighted by depth (sorted fine-tuning),
      "layer_skip" on those of LayerSkip, with layers dropped, "experts" as
      "dense", but with `EXPERTS` experts in every layer, of which a byte runs
      `TOP_K`: together as wide as the dense layer.
    quick: trained for a few steps: for smoke runs.
  """
  layer = expert_block if kind == "experts" else None
  config = TrainConfig(
    name=f"headlines/{kind}",
    build=lambda rngs: DecoderLM(MODEL, layer=layer, rngs=rngs),
    loss=LOSSES[kind],
    data=DATA,
    optimizer=OPTIMIZER,
    steps=STEPS,
    eval_every=STEPS,
    checkpoint_every=500,
    log_every=50,
    keep=1,
  )
  return fit(config, quick)


def expert_block(rngs: nnx.Rngs) -> Block:
  """A layer of the size of `MODEL`'s, its feed-forward half of experts."""
  features, hidden = MODEL.features, MODEL.hidden // TOP_K
  experts = stacked(lambda r: Mlp(features, hidden, rngs=r), EXPERTS, rngs)
  router = MixtralRouter(
    features, EXPERTS, top_k=TOP_K, balance=BALANCE, rngs=rngs
  )
  return decoder_block(MODEL, rngs, MixtureOfExperts(router, experts))


def fit(config: TrainConfig, quick: bool = False) -> Any:
  """The model of a run under runs/headlines, trained now or found there.

  `quick` makes it another run, of 4 steps.
  """
  if quick:
    config = dataclasses.replace(
      config, name=f"{config.name}-quick", steps=4, eval_batches=1
    )
  result = train(config, out=Path("runs") / config.name, progress=False)
  if result.stopped:
    raise SystemExit(128 + result.stopped)
  return result.model


@functools.cache
def texts(
  count: int,
  length: int = DATA.context,
  *,
  split: Literal["train", "validation"] = "validation",
) -> Int32[Array, "N S"]:
  """Windows of `length` bytes, spread evenly over the files of a split.

  No file is in both splits: calibrate on "train", measure on "validation".

  Raises:
    ValueError: the split has fewer such windows.
  """
  cut = windows(getattr(load_corpus(DATA), split), length - 1)
  if count > len(cut):
    raise ValueError(
      f"{count=} windows of {length} bytes, but the {split} split has only"
      f" {len(cut)}."
    )
  chosen = np.linspace(0, len(cut) - 1, count).astype(int)
  return jnp.asarray(cut[chosen], jnp.int32)


@jax.jit
def bits_per_byte(
  model, text: Int32[Array, "N S"], stack: Callable = PLAIN
) -> Float32[Array, ""]:
  """Cross-entropy of every byte but the first of a window, given those before.

  `stack` is how the layers are run; bound with `jax.tree_util.Partial`.
  """
  out = model(text[:, :-1], stack=stack)
  return cross_entropy(out.logits, text[:, 1:]).mean() / jnp.log(2)


@jax.jit
def layer_accuracy(
  model: DecoderLM, text: Int32[Array, "N S"]
) -> Float32[Array, " L"]:
  """Share of next bytes that the readout after each layer gets right."""
  out = model(text[:, :-1], stack=every_layer)
  right = lambda h: accuracy(model.readout(h), text[:, 1:])
  return jax.lax.map(right, out.hidden)


class Images(NamedTuple):
  """Images and what they show.

  Attributes:
    pixels: f32[N, 8, 8], in 0..1.
    labels: i32[N], in 0..9.
  """

  pixels: np.ndarray
  labels: np.ndarray


class Digits(NamedTuple):
  """Three parts without a common image: 1000, 397 and 400."""

  train: Images
  calibration: Images
  test: Images


@functools.cache
def digits() -> Digits:
  """The 1797 handwritten digits that come with scikit-learn."""
  from sklearn.datasets import load_digits  # an extra: `adaptivejax[demo]`

  found = load_digits(return_X_y=True)
  pixels = np.asarray(found[0], np.float32).reshape(-1, 8, 8) / 16
  labels = np.asarray(found[1], np.int32)
  order = np.random.default_rng(0).permutation(len(labels))
  parts = np.split(order, (1000, 1397))
  return Digits(*(Images(pixels[part], labels[part]) for part in parts))


def main() -> None:
  """Trains the language models and prints how good they are."""
  text = texts(200)
  for kind in get_args(Kind):
    model = byte_lm(kind)
    bits = float(bits_per_byte(model, text))
    layers = " ".join(f"{a:.3f}" for a in layer_accuracy(model, text))
    print(f"{kind}: {bits:.3f} bits per byte; accuracy {layers}")


if __name__ == "__main__":
  main()
