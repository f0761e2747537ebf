# SPDX-License-Identifier: Apache-2.0
"""A byte model and a config of the smallest sizes, for tests of training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from adaptivejax.training import DataConfig, OptimizerConfig, TrainConfig

CONTEXT, BATCH = 8, 4


class TinyCost(NamedTuple):
  spent: jax.Array
  full: jax.Array


class Output(NamedTuple):
  logits: jax.Array
  cost: TinyCost


class Tiny(nnx.Module):
  """Predicts a byte from the byte before."""

  def __init__(self, features: int = 8, *, rngs: nnx.Rngs):
    self.embed = nnx.Embed(256, features, rngs=rngs)
    self.norm = nnx.RMSNorm(features, rngs=rngs)
    self.head = nnx.Linear(features, 256, rngs=rngs)

  def __call__(self, tokens, *, key=None):
    hidden = self.norm(self.embed(tokens))
    if key is not None:
      hidden += 0.01 * jax.random.normal(key, hidden.shape)
    cost = TinyCost(jnp.float32(1), jnp.float32(4))
    return Output(self.head(hidden), cost)


def loss(model, batch, key):
  output = model(batch[:, :-1], key=key)
  nats = optax.softmax_cross_entropy_with_integer_labels(
    output.logits, batch[:, 1:]
  ).mean()
  return nats, {"share": output.cost.spent / output.cost.full}


def write_corpus(folder, files=40, size=400):
  folder.mkdir()
  for i in range(files):
    (folder / f"file{i}.txt").write_text(f"line {i} of a text\n" * (size // 18))
  return folder


def config(corpus, *, steps=6, features=8, optimizer=None, **fields):
  return TrainConfig(
    name="tiny",
    build=fields.pop("build", lambda rngs: Tiny(features, rngs=rngs)),
    loss=fields.pop("loss", loss),
    data=DataConfig(
      corpus=str(corpus), context=CONTEXT, batch=BATCH, validation=0.2
    ),
    optimizer=optimizer or OptimizerConfig(warmup=2),
    steps=steps,
    **{"log_every": 1, "eval_every": 3, "checkpoint_every": 2, **fields},
  )
