# SPDX-License-Identifier: Apache-2.0
"""Entropy adaptive decoding: one layer writes, six where it is unsure.

Text is drawn at temperature 1 and judged by the large model.  Thresholds are
quantiles of the small model's mean entropy over a window, on training files.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.core.halting import entropy
from adaptivejax.core.losses import cross_entropy
from adaptivejax.decode import generate
from adaptivejax.methods.decode import EntropyAdaptive
from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import language_modeling
from benchmarks.headlines import Headline, beds

PAPER = (
  "96.7 % of the 11B model's performance on MATH while using it for 43 % of"
  " tokens, at 41.5 % less compute"
)
SMALL = DecoderConfig(layers=1, features=64, hidden=256, heads=4, kv_heads=4)
ROWS, PROMPT, NEW, DWELL = 128, 16, 48, 4
QUANTILES = (0.3, 0.5, 0.7)
CHUNKS = 1, 6, 12, 24, 40
WANTED = 0.6  # most of the tokens that may be the large model's


def measure(quick: bool) -> Headline:
  small, large = beds.fit(_config(), quick), beds.byte_lm("dense", quick)
  seen = beds.texts(20 if quick else 200, split="train")
  doubts = np.asarray(_doubts(small, seen, EntropyAdaptive.window))
  prompt = beds.texts(ROWS, PROMPT)
  keys = jax.random.split(jax.random.key(0), len(prompt))

  @jax.jit
  def write(policy):
    """Row by row: a batch reads as long a chunk as its neediest row."""
    alone = lambda row: generate(
      small,
      row[0][None],
      steps=8 if quick else NEW,
      policy=policy,
      temperature=1.0,
      key=row[1],
    )
    return jax.lax.map(alone, (prompt, keys))

  levels = {"small": np.inf, "large": -np.inf} | {
    f"{q:.0%}": np.quantile(doubts, q) for q in QUANTILES
  }
  figures = {}
  for name, level in levels.items():
    policy = EntropyAdaptive(
      large, jnp.float32(level), jnp.int32(DWELL), chunks=CHUNKS
    )
    made = write(policy)
    asked = (made.depth[:, 0, 1:] - SMALL.layers) / beds.MODEL.layers
    text = jnp.concatenate([prompt, made.tokens[:, 0]], 1)
    figures |= {
      f"bits_{name}": float(_bits(large, text)),
      f"asked_{name}": float(asked.mean()),
      f"flops_{name}": float(made.cost.total().share),
    }
  gap = figures["bits_small"] - figures["bits_large"]
  for q in QUANTILES:
    name = f"{q:.0%}"
    won = figures["bits_small"] - figures[f"bits_{name}"]
    figures[f"won_{name}"] = won / gap
  inside = [q for q in QUANTILES if figures[f"asked_{q:.0%}"] < WANTED]
  chosen = f"{min(inside, default=QUANTILES[-1]):.0%}"
  asked, won = figures[f"asked_{chosen}"], figures[f"won_{chosen}"]
  flops = figures[f"flops_{chosen}"]
  words = (
    f"bits per byte of the text, by the large model:"
    f" {figures[f'bits_{chosen}']:.2f}, against {figures['bits_large']:.2f} of"
    f" its own and {figures['bits_small']:.2f} of the small model's; it writes"
    f" {asked:.0%} of the bytes for {won:.0%} of the gain (by chance as much"
    f" as its share). Counting what it reads to catch up that takes"
    f" {flops:.0%} of its FLOPs, not fewer"
  )
  spares = asked < WANTED and asked < won
  return Headline(words, figures, bool(spares and flops < 1))


def _config() -> TrainConfig:
  return TrainConfig(
    name="headlines/one_layer",
    build=lambda rngs: DecoderLM(SMALL, rngs=rngs),
    loss=language_modeling,
    data=beds.DATA,
    optimizer=beds.OPTIMIZER,
    steps=beds.STEPS,
    eval_every=beds.STEPS,
    checkpoint_every=500,
    log_every=50,
    keep=1,
  )


@functools.partial(jax.jit, static_argnums=2)
def _doubts(model, text, window: int):
  """Mean entropies over `window` bytes in a row."""
  each = entropy(model(text).logits)
  sums = jnp.cumsum(each, axis=1)
  return (sums[:, window:] - sums[:, :-window]) / window


@jax.jit
def _bits(model, text):
  """Bits per byte of what follows the prompt."""
  nats = cross_entropy(model(text[:, :-1]).logits, text[:, 1:])
  return nats[:, PROMPT - 1 :].mean() / jnp.log(2)
