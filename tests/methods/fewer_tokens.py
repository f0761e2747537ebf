# SPDX-License-Identifier: Apache-2.0
"""A small text encoder, and what losing tokens means, row by row in NumPy.

The oracle keeps a list of tokens; a rule says which of them become one.

Axes: n tokens that are left, N original tokens, D features, H heads.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import erf

from adaptivejax.models import Encoder, EncoderConfig, TextInput
from tests.methods.host import shaken

B, N, L, D, H = 3, 24, 3, 16, 2
CONFIG = EncoderConfig(
  TextInput(vocab=40, context=N, types=1),
  layers=L,
  features=D,
  hidden=24,
  heads=H,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 39, (B, N)))
LENGTHS = jnp.asarray([N, 20, 23])


def build(rngs):
  """An encoder whose tokens differ, as those of a trained one do."""
  model = Encoder(CONFIG, rngs=rngs)
  for table in (model.embedding.words, model.embedding.places):
    table.set_value(30 * table.get_value())
  return model


@functools.cache
def encoder():
  return shaken(build(nnx.Rngs(0)))


class Layer(NamedTuple):
  """What a rule sees: of n tokens, after the attention of a layer."""

  l: int
  keys: np.ndarray  # [H, n, W]
  values: np.ndarray  # [H, n, W]
  weights: np.ndarray  # [H, n, n], of attention
  size: np.ndarray  # [n]


class Left(NamedTuple):
  """What is left of a row."""

  x: np.ndarray  # [n, D], after the last norm
  size: np.ndarray  # [n]
  origin: np.ndarray  # [N], -1 if given up
  restored: np.ndarray  # [N, D]
  depth: np.ndarray  # [N]


def params(model):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), model)


def norm(module, x):
  x = x - x.mean(-1, keepdims=True)
  scale, bias = module.scale.get_value(), module.bias.get_value()
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale + bias


def linear(module, x):
  return x @ module.kernel.get_value() + module.bias.get_value()


def embedded(model, tokens):
  table = model.embedding
  x = table.words.get_value()[np.asarray(tokens)]
  x = x + table.types.get_value()[0] + table.places.get_value()[: len(x)]
  return norm(table.norm, x)


def run(model, tokens, rule=None, proportional=False) -> Left:
  """One row of real tokens.

  Args:
    rule: `Layer -> [(members, weights), ...]`, the tokens after that layer.
    proportional: keys attract by their size.
  """
  x = embedded(model, tokens)
  groups = [[i] for i in range(len(x))]
  size, gave = np.ones(len(x)), {}
  depth = np.zeros(len(x))
  for l in range(L):
    layer = jax.tree.map(lambda a, l=l: a[l], model.layers)
    a = layer.attention
    h = norm(layer.norm_attention, x)
    heads = lambda y: y.reshape(len(y), H, -1).swapaxes(0, 1)
    q = heads(linear(a.query, h))
    k, v = map(heads, np.split(linear(a.key_value, h), 2, axis=-1))
    scores = q @ k.swapaxes(1, 2) / q.shape[-1] ** 0.5
    scores = scores + np.log(size) * proportional
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    before = x
    x = x + linear(a.out, (weights @ v).swapaxes(0, 1).reshape(len(x), -1))
    stay = [([i], [1.0]) for i in range(len(x))]
    chosen = rule(Layer(l, k, v, weights, size)) if rule else stay
    kept = {i for members, _ in chosen for i in members}
    for i in set(range(len(x))) - kept:
      gave |= dict.fromkeys(groups[i], before[i])
    x = np.stack([np.average(x[m], axis=0, weights=w) for m, w in chosen])
    size = np.array([size[m].sum() for m, _ in chosen])
    groups = [[t for i in m for t in groups[i]] for m, _ in chosen]
    depth[[t for group in groups for t in group]] += 1
    h = linear(layer.mlp.up, norm(layer.norm_mlp, x))
    h = h * (1 + erf(h / 2**0.5)) / 2
    x = x + linear(layer.mlp.down, h)
  x = norm(model.norm, x)
  origin = np.full(len(depth), -1)
  for slot, members in enumerate(groups):
    origin[members] = slot
  restored = np.stack(
    [
      x[origin[n]] if origin[n] >= 0 else norm(model.norm, gave[n])
      for n in range(len(depth))
    ]
  )
  return Left(x, size, origin, restored, depth)


def batch(model, tokens, lengths, rule=None, proportional=False):
  """`restored` of all rows, [B, N, D], padding 0."""
  model, out = params(model), np.zeros((*tokens.shape, D))
  for i, (row, n) in enumerate(zip(np.asarray(tokens), np.asarray(lengths))):
    out[i, :n] = run(model, row[:n], rule, proportional).restored
  return out.astype(np.float32)


def pairs(keys):
  """`{source: (cosine, partner)}`, by brute force; the first token is none."""
  metric, found = keys.mean(0), {}
  for i in range(2, len(metric), 2):
    for j in range(1, len(metric), 2):
      a, b = metric[i], metric[j]
      cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
      if i not in found or cosine > found[i][0]:
        found[i] = cosine, j
  return found


def merged(layer, sources):
  """The groups where the sources go to their partners, in order."""
  found, n = pairs(layer.keys), layer.keys.shape[1]
  groups = {i: [i] for i in range(n) if i not in sources}
  for i in sources:
    groups[found[i][1]].append(i)
  return [(groups[i], layer.size[groups[i]]) for i in sorted(groups)]


def most_alike(merges):
  """The rule of ToMe."""

  def rule(layer):
    found = pairs(layer.keys)
    ranked = sorted(found, key=lambda i: -found[i][0])
    return merged(layer, ranked[:merges])

  return rule


def alike(threshold):
  """The rule of similar merging."""

  def rule(layer):
    found = pairs(layer.keys)
    return merged(layer, [i for i in found if found[i][0] > threshold])

  return rule


def attended(keep, at, fuse=True):
  """The rule of EViT."""

  def rule(layer):
    n = layer.keys.shape[1]
    a = layer.weights.mean(0)[0]
    stay = 1 + int(np.ceil(keep * (n - 1)))
    if layer.l not in at or stay + fuse >= n:
      return [([i], [1.0]) for i in range(n)]
    ranked = sorted(range(1, n), key=lambda i: -a[i])
    kept, rest = {0, *ranked[: stay - 1]}, sorted(ranked[stay - 1 :])
    groups = {i: [i] for i in kept} | ({rest[0]: rest} if fuse else {})
    return [(groups[i], a[groups[i]]) for i in sorted(groups)]

  return rule


def hit(samples):
  """The rule of ATS: each point searches the cumulative sum."""

  def rule(layer):
    n = layer.keys.shape[1]
    length = np.linalg.norm(layer.values, axis=-1)
    score = (layer.weights[:, 0] * length).sum(0)
    score[0] = 0
    upto = np.cumsum(score / max(score.sum(), 1e-30))
    points = (
      (2 * np.arange(1, samples + 1) - 1) / (2 * samples) if samples else []
    )
    found = {0} | {int(np.searchsorted(upto, u)) for u in points}
    return [([i], [1.0]) for i in sorted(found) if i < n]

  return rule
