# SPDX-License-Identifier: Apache-2.0
"""What headlines of routing rules share: byte models trained for few steps.

All are of the size of `beds.MODEL`, saw the same text in the same order, and
differ in the feed-forward half of their layers only.

Axes: N windows, S bytes of a window, L layers, E experts.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from adaptivejax.core.losses import cross_entropy
from adaptivejax.methods.experts import MixtralRouter
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import MixtureOfExperts, Mlp, stacked
from adaptivejax.training import OptimizerConfig, TrainConfig
from adaptivejax.training.tasks import language_modeling
from benchmarks.headlines import beds

EXPERTS, TOP_K, STEPS = 8, 2, 300
FEATURES, HIDDEN = beds.MODEL.features, beds.MODEL.hidden // TOP_K
BALANCE = 0.01
Make = Callable[[nnx.Rngs], nnx.Module]


class Reading(NamedTuple):
  """What a model made of a text."""

  nats: np.ndarray  # of each byte, f32[N, S]
  load: np.ndarray  # items of each expert, f32[L, E]
  choices: np.ndarray  # experts of each byte, f32[L, N, S]
  spent: float  # FLOPs of all bytes

  @property
  def bits(self) -> float:
    """Per byte."""
    return float(self.nats.mean()) / math.log(2)

  @property
  def violation(self) -> float:
    """Load of the fullest expert over the mean, less 1; mean over layers."""
    return float((self.load.max(1) / self.load.mean(1)).mean() - 1)

  def gain(self, other: "Reading") -> tuple[float, float]:
    """Bits per byte below `other`, and the standard error over windows."""
    each = (other.nats - self.nats).mean(1) / math.log(2)
    return float(each.mean()), float(each.std() / math.sqrt(len(each)))


def mixture(router: Make, hidden: int = HIDDEN, count: int = EXPERTS) -> Make:
  """Makes `count` experts behind a router."""

  def make(rngs):
    experts = stacked(lambda r: Mlp(FEATURES, hidden, rngs=r), count, rngs)
    return MixtureOfExperts(router(rngs), experts)

  return make


def byte_lm(
  name: str,
  mlp: Make | None,
  quick: bool,
  *,
  steps: int = STEPS,
  optimizer: OptimizerConfig = beds.OPTIMIZER,
  eval_every: int = STEPS,
) -> DecoderLM:
  """A model with this feed-forward half, the dense one if not given."""

  def layer(rngs):
    return decoder_block(beds.MODEL, rngs, None if mlp is None else mlp(rngs))

  config = TrainConfig(
    name=f"headlines/{name}",
    build=lambda rngs: DecoderLM(beds.MODEL, layer=layer, rngs=rngs),
    loss=language_modeling,
    data=beds.DATA,
    optimizer=optimizer,
    steps=steps,
    eval_every=eval_every,
    checkpoint_every=steps,
    log_every=50,
    keep=1,
  )
  return beds.fit(config, quick)


@functools.cache
def top_two(quick: bool) -> DecoderLM:
  """The mixture that rules are compared with: the two best of eight."""
  router = lambda rngs: MixtralRouter(
    FEATURES, EXPERTS, top_k=TOP_K, balance=BALANCE, rngs=rngs
  )
  return byte_lm("top_two", mixture(router), quick)


def read(model: DecoderLM, text: jax.Array) -> Reading:
  """A model's losses on held-out text, and what its experts did."""
  nats, load, choices, spent = _read(model, text)
  to_numpy = lambda parts: np.asarray(parts[0] if parts else np.zeros((1, 1)))
  return Reading(
    np.asarray(nats), to_numpy(load), to_numpy(choices), float(spent)
  )


@jax.jit
def _read(model, text):
  out = model(text[:, :-1])
  nats = cross_entropy(out.logits, text[:, 1:])
  return nats, out.signals.load, out.signals.choices, out.cost.spent
