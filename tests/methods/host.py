# SPDX-License-Identifier: Apache-2.0
"""Small models, their parameters shaken; the decoder goes token by token."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from adaptivejax.decode import FULL
from adaptivejax.models import (
  Classifier,
  ClassifierConfig,
  DecoderConfig,
  DecoderLM,
)
from adaptivejax.nn import Setting, adjust
from tests import reference

B, T, PROMPT = 3, 10, 5
CONFIG = DecoderConfig(
  vocab=13, layers=4, features=16, hidden=32, heads=2, kv_heads=1, tied=False
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (B, T)))
ENCODER = ClassifierConfig(
  tokens=5, inputs=3, classes=4, layers=4, features=16, hidden=24, heads=2
)
ROWS = 9
INPUTS = jnp.asarray(
  np.random.default_rng(1).normal(size=(ROWS, 5, 3)), jnp.float32
)
LABELS = jnp.asarray(np.random.default_rng(2).integers(0, 4, ROWS))


def shaken(module, seed=0):
  """Parameters off their initial ones and zeros, which hide mistakes."""
  leaves, tree = jax.tree.flatten(module)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  moved = [
    a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)
  ]
  module = jax.tree.unflatten(tree, moved)
  return adjust(module, 0.0) if nnx.state(module, Setting) else module


@functools.cache
def model(layer=None, seed=0):
  return shaken(DecoderLM(CONFIG, layer=layer, rngs=nnx.Rngs(seed)), seed)


@functools.cache
def encoder(seed=0):
  return shaken(Classifier(ENCODER, rngs=nnx.Rngs(seed)), seed)


@functools.cache
def every_exit():
  """`(logits [K, B, C], pooled [K, B, D])` of `encoder`, as NumPy."""
  return jax.tree.map(np.array, reference.classifier(encoder(), INPUTS))


def leave(rule, memory=None):
  """The answer of `encoder` under a rule."""
  return _leave(encoder(), rule, memory)  # made out here: a cache keeps it


@jax.jit
def _leave(model, rule, memory):
  return model(INPUTS, rule, memory)


@jax.jit
def decode(model, tokens, policy=FULL, prefill=FULL, cache=None):
  """`(logits, depth, cost, cache)` of the tokens after the prompt."""
  if cache is None:
    cache = model.empty_cache(*tokens.shape)
    cache = model(tokens[:, :PROMPT], cache, stack=prefill).cache

  def step(cache, token):
    out = model(token[:, None], cache, stack=policy)
    return out.cache, (out.logits[:, 0], out.depth[:, 0], out.cost)

  cache, out = lax.scan(step, cache, tokens[:, PROMPT:].T)
  logits, depth, cost = out
  return jnp.swapaxes(logits, 0, 1), depth.T, cost.total(), cache


def keys_of(module, x):
  """Keys and values of a `Block`'s tokens, head-major as in the cache."""
  h = reference.norm(module.norm_attention, x)
  kv = h @ module.attention.key_value.kernel.get_value()
  k, v = jnp.split(kv.reshape(*x.shape[:2], -1, module.attention.width), 2, 2)
  positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
  k = reference.rotate(k, positions)
  return jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1)


def assert_cache_holds(cache, model, tokens, states):
  """The cache of a decoder whose layer l ended in `states[l]`."""
  before = [model.embedding.get_value()[tokens], *states[:-1]]
  for i, module in enumerate(reference.layers_of(model)):
    for got, want in zip(
      (cache.k[:, i], cache.v[:, i]), keys_of(module, before[i])
    ):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


class Replay(NamedTuple):
  """What a simulation did with the K tokens after each prompt.

  Attributes:
    tokens: that were read, i32[B, K].
    exits: layers of each of them, i32[B, K].
    logits: after each of them, f32[B, K, V].
    states: of all tokens after every layer, f[L, B, P + K, D]; the rows are
      padded on the right.
  """

  tokens: np.ndarray
  exits: np.ndarray
  logits: np.ndarray
  states: np.ndarray


@jax.jit
def _states(model, text, exits):
  """The embedding and the states of all layers, f[L+1, B, T, D]."""
  live = np.arange(CONFIG.layers)[:, None, None] < exits
  states = reference.hidden(model, text, live, np.ones(live.shape, bool))
  return jnp.stack([model.embedding.get_value()[text], *states])


def replay(model, prompts, lengths, leave, *, given=None, steps=0) -> Replay:
  """Decodes token by token, without a cache or a loop over the layers.

  Every token tries all layers, and `leave(path, t)` says after how many it
  leaves, `path` being its states f[L+1, D], the embedding first, and t its
  position; its exit state then stands in for all deeper layers.

  Args:
    prompts: i32[B, P], padded on the right; they run all layers.
    lengths: real tokens of each.
    given: the tokens to read, i32[B, K]; without, K = `steps` greedy ones.
  """
  many = steps if given is None else given.shape[1]
  rows, count = np.arange(len(prompts)), CONFIG.layers
  text = np.pad(np.asarray(prompts), ((0, 0), (0, many)))
  exits = np.full(text.shape, count)

  def run():
    return np.asarray(_states(model, text, exits))

  said = reference.readout(model, run()[-1][rows, lengths - 1])
  tokens, depths, logits = [], [], []
  for i in range(many):
    at = lengths + i
    text[rows, at] = said.argmax(-1) if given is None else given[:, i]
    exits[rows, at] = count
    path = run()[:, rows, at]
    left = np.array([leave(path[:, b], at[b]) for b in rows])
    exits[rows, at] = left
    said = reference.readout(model, path[left, rows])
    tokens.append(text[rows, at])
    depths.append(left)
    logits.append(said)
  last = lambda parts: np.stack(parts, 1)
  return Replay(last(tokens), last(depths), last(logits), run()[1:])
