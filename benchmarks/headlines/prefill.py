# SPDX-License-Identifier: Apache-2.0
"""What headlines of sparse prompts share: a byte model's heads, and budgets.

The model is that of `beds`, trained on windows of 256 bytes, as many bytes a
step; a block is of 8.  Density is the share of the visible keys that a tile
computes, recall the share of the true attention that it so keeps, both the mean
over layers, heads and texts.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from adaptivejax.methods.attention import Budgets, MInference
from adaptivejax.models import DecoderLM
from adaptivejax.nn import SparsePrefill, coverage_of, with_look
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import language_modeling
from benchmarks.headlines import beds

HEADS, BLOCK, DENSITY = beds.MODEL.heads, 8, 0.25
CONTEXT = 256
SIZES = {"block_q": BLOCK, "block_kv": BLOCK}
WINDOWS = (8, 16, 24, 32)


@functools.cache
def model(quick: bool) -> DecoderLM:
  """The byte model that reads 256 bytes."""
  config = TrainConfig(
    name="headlines/long",
    build=lambda rngs: DecoderLM(beds.MODEL, rngs=rngs),
    loss=language_modeling,
    data=dataclasses.replace(beds.DATA, context=CONTEXT, batch=6),
    optimizer=beds.OPTIMIZER,
    steps=beds.STEPS,
    eval_every=beds.STEPS,
    checkpoint_every=500,
    log_every=50,
    keep=1,
  )
  return beds.fit(config, quick)


class Kept(NamedTuple):
  """What a look keeps of the model's attention.

  Attributes:
    recall: of the attention.
    density: of the pairs.
    good: heads that keep 0.95 or more, a share.
  """

  recall: float
  density: float
  good: float


def kept(looks: Mapping[str, SparsePrefill], quick: bool) -> dict[str, Kept]:
  """What each look keeps, none of them at work."""
  text = beds.texts(4 if quick else 30, CONTEXT)
  read = jax.jit(
    lambda model, text, looks: coverage_of(model, text, looks, HEADS)
  )
  mass, pairs = map(np.asarray, read(model(quick), text, list(looks.values())))
  return {
    name: Kept(
      float(mass[..., i].mean()),
      float(pairs[..., i].mean()),
      float((mass[..., i] >= 0.95).mean()),
    )
    for i, name in enumerate(looks)
  }


def densest(found: Mapping[str, Kept], start: str) -> str:
  """Of the looks whose name starts so, the densest within `DENSITY`."""
  names = [name for name in found if name.startswith(start)]
  within = [name for name in names if found[name].density <= DENSITY]
  least = min(names, key=lambda name: found[name].density)
  return max(within or [least], key=lambda name: found[name].density)


def bits(look: SparsePrefill | None, quick: bool) -> float:
  """Bits per byte of the model, its attention by a look; dense if None."""
  text = beds.texts(4 if quick else 60, CONTEXT)
  read = model(quick)
  read = read if look is None else with_look(read, look)
  return float(beds.bits_per_byte(read, text))


def a_shape(window: int) -> MInference:
  """A first key and a window in all heads: what needs no choice."""
  budgets = Budgets(sinks=1, window=window)
  return MInference(("a_shape",) * HEADS, budgets, **SIZES)


def figures(found: Mapping[str, Kept]) -> dict[str, float]:
  """The numbers by name."""
  return {
    f"{name}_{key}": value
    for name, one in found.items()
    for key, value in one._asdict().items()
  }
