# SPDX-License-Identifier: Apache-2.0
"""The config of a small mixture, in which processes tell what they do.

Each notes the rows that it reads of a batch.  With STOP_AT in the environment,
process 1 gets SIGTERM during that step, as a host that is preempted does.
"""

import os
import signal
from pathlib import Path

import jax

from adaptivejax.methods.experts import MixtralRouter
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import MixtureOfExperts, Mlp, stacked
from adaptivejax.training import (
  DataConfig,
  OptimizerConfig,
  TrainConfig,
  progress,
)
from adaptivejax.training.data import Batch
from adaptivejax.training.tasks import language_modeling

FEATURES, EXPERTS = 16, 4
SHAPE = DecoderConfig(
  layers=2, features=FEATURES, hidden=32, heads=4, kv_heads=4
)


def build(rngs):
  """A decoder with experts in each of its layers."""

  def layer(rngs):
    expert = lambda r: Mlp(FEATURES, 32, gated=True, rngs=r)
    router = MixtralRouter(FEATURES, EXPERTS, rngs=rngs)
    mixture = MixtureOfExperts(router, stacked(expert, EXPERTS, rngs))
    return decoder_block(SHAPE, rngs, mixture)

  return DecoderLM(SHAPE, layer=layer, rngs=rngs)


def config():
  """Six steps; a checkpoint only where it stops."""
  _note_reads()
  if "STOP_AT" in os.environ:
    _stop_at(int(os.environ["STOP_AT"]))
  return TrainConfig(
    name="run",
    build=build,
    loss=language_modeling,
    data=DataConfig(corpus="corpus", context=16, batch=8, validation=0.2),
    optimizer=OptimizerConfig(warmup=2),
    steps=6,
    log_every=1,
    eval_every=3,
    eval_batches=2,
    checkpoint_every=1000,
  )


def _note_reads():
  read = Batch.read

  def read_and_note(batch, part):
    rows = range(len(batch.numbers))[part[0]]
    with Path(f"reads{jax.process_index()}").open("a") as file:
      file.write("".join(f"{row}\n" for row in rows))
    return read(batch, part)

  Batch.read = read_and_note


def _stop_at(at):
  advance = progress.Display.advance

  def advance_and_signal(display, step):
    advance(display, step)
    if step == at and jax.process_index() == 1:
      signal.raise_signal(signal.SIGTERM)

  progress.Display.advance = advance_and_signal
