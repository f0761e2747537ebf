# SPDX-License-Identifier: Apache-2.0
"""What the headlines of exits share: a small classifier of digits.

An image is eight tokens, its rows, of eight features.  Training takes seconds.

Axes: N images, K exits, C classes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from adaptivejax.core.losses import cross_entropy
from adaptivejax.models import Classifier, ClassifierConfig
from adaptivejax.nn import Attention, Block
from benchmarks.headlines.beds import Images, digits

CONFIG = ClassifierConfig(features=32, hidden=128)
STEPS, BATCH, RATE = 800, 64, 3e-3


class Set(NamedTuple):
  """Images as rows of tokens, and their labels."""

  inputs: jax.Array  # f32[N, 8, 8]
  labels: jax.Array  # i32[N]


class Data(NamedTuple):
  """Three parts without a common image."""

  train: Set
  calibration: Set
  test: Set


@functools.cache
def data(noise: float = 0.0) -> Data:
  """The digits, with Gaussian noise on pixels of 0..1."""
  rng = np.random.default_rng(1)

  def tokens(images: Images) -> Set:
    spoilt = images.pixels + noise * rng.normal(size=images.pixels.shape)
    return Set(jnp.asarray(spoilt, jnp.float32), jnp.asarray(images.labels))

  return Data(*map(tokens, digits()))


def build(seed: int = 0) -> Classifier:
  """An untrained classifier of digits with six exits."""
  return Classifier(CONFIG, rngs=nnx.Rngs(seed))


def with_mlp(
  config: ClassifierConfig, mlp: Callable[[nnx.Rngs], nnx.Module], seed: int
) -> Classifier:
  """An untrained encoder whose feed-forward halves are made by `mlp`."""

  def layer(rngs):
    attention = Attention(config.features, config.heads, rngs=rngs)
    return Block(config.features, attention, mlp(rngs))

  return Classifier(config, layer=layer, rngs=nnx.Rngs(seed))


def exit_losses(model: Classifier, batch: Set, key=None):
  """`(cross-entropy [K, N], every exit)`."""
  out = model.every_exit(batch.inputs, key)
  nats = jax.vmap(cross_entropy, (0, None))(out.logits, batch.labels)
  return nats, out


def fit(
  model: Any,
  loss: Callable[..., jax.Array],
  examples: Any,
  *,
  steps: int = STEPS,
  rate: float = RATE,
  seed: int = 0,
) -> Any:
  """The parameters of `model`, any pytree, after Adam on random batches.

  Args:
    loss: `loss(model, batch, key) -> f32[]`.
    examples: pytree with N leading.
  """
  count = len(jax.tree.leaves(examples)[0])
  schedule = optax.cosine_decay_schedule(rate, steps)
  adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

  def step(carry, key):
    model, state = carry
    pick, noise = jax.random.split(key)
    chosen = jax.random.randint(pick, (min(BATCH, count),), 0, count)
    batch = jax.tree.map(lambda a: a[chosen], examples)
    value, slope = jax.value_and_grad(loss)(model, batch, noise)
    change, state = adam.update(slope, state)
    return (optax.apply_updates(model, change), state), value

  @jax.jit
  def run(model):
    keys = jax.random.split(jax.random.key(seed), steps)
    (model, _), values = jax.lax.scan(step, (model, adam.init(model)), keys)
    return model, values

  return run(model)[0]


def correct(logits: jax.Array, labels: jax.Array) -> float:
  """Share of rows whose most likely class is the label."""
  return float((logits.argmax(-1) == labels).mean())


@jax.jit
def every_exit(model: Classifier, inputs: jax.Array):
  """All exits, without the training form."""
  return model.every_exit(inputs)


@jax.jit
def answer(model: Classifier, inputs: jax.Array, rule, memory=None):
  """The answer under a rule."""
  return model(inputs, rule, memory)
