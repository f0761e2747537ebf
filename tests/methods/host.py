# SPDX-License-Identifier: Apache-2.0
"""Small models, their parameters shaken; the decoder goes token by token."""

import functools

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


@jax.jit
def leave(rule, memory=None):
  """The answer of `encoder` under a rule."""
  return encoder()(INPUTS, rule, memory)


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


def replay(model, prompt, leave, *, given=None, steps=None):
  """Decodes one row token by token, without a cache or a loop over layers.

  Every token tries all layers, and `leave(path)` says after how many it leaves,
  `path` being its states f[L+1, D], the embedding first; its exit state then
  stands in for all deeper layers.  The prompt runs all layers.

  Args:
    given: the tokens to read; without, `steps` greedy ones, the first of them
      being the prompt's.

  Returns:
    `(tokens, exits, states, logits)`: what was read after the prompt, the exits
    of all tokens, the states after every layer f[L, 1, T, D], and the logits
    after each token read.
  """
  count = CONFIG.layers
  live = lambda exits: np.arange(count)[:, None, None] < np.asarray(exits)
  run = lambda text, exits: reference.hidden(
    model, np.array([text]), live(exits), np.ones((count, 1, len(text)), bool)
  )
  text, exits = list(map(int, prompt)), [count] * len(prompt)
  said = reference.readout(model, run(text, exits)[-1])[0, -1]
  logits = []
  for i in range(len(given) if given is not None else steps - 1):
    text.append(int(said.argmax() if given is None else given[i]))
    exits.append(count)
    states = [model.embedding.get_value()[np.array([text])], *run(text, exits)]
    exits[-1] = leave(np.array([state[0, -1] for state in states]))
    said = reference.readout(model, run(text, exits)[-1])[0, -1]
    logits.append(said)
  tokens = np.array(text[len(prompt) :])
  return tokens, np.array(exits), run(text, exits), np.array(logits)
