# SPDX-License-Identifier: Apache-2.0
"""What the models mean: no cache, no conditional, no scan, layer by layer.

Plain `jnp` on whole sequences, written apart from the library: it reads only the
parameters of its modules.

Axes: B batch, T tokens, D features, H query heads, G key heads, W head width.
"""

import jax
import jax.numpy as jnp
import numpy as np


def norm(module, x):
  scale = module.scale.get_value()
  return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def rotate(x, positions):
  """x [B, T, H, W] as complex numbers, turned."""
  half = x.shape[-1] // 2
  angle = positions[..., None, None] * 10_000.0 ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
  return jnp.concatenate([turned.real, turned.imag], -1)


def attention(module, x, positions=None, live=None):
  """From live tokens to live tokens at or before them; zero elsewhere."""
  batch, tokens, features = x.shape
  if positions is None:
    positions = np.broadcast_to(np.arange(tokens), (batch, tokens))
  live = np.ones((batch, tokens), bool) if live is None else live
  w = module.width
  q = (x @ module.query.kernel.get_value()).reshape(batch, tokens, -1, w)
  kv = x @ module.key_value.kernel.get_value()
  k, v = jnp.split(kv.reshape(batch, tokens, -1, w), 2, axis=2)
  q, k = rotate(q, positions), rotate(k, positions)
  share = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, share, axis=2), jnp.repeat(v, share, axis=2)
  visible = positions[:, None, :] <= positions[:, :, None]
  visible = (visible & live[:, None, :] & live[:, :, None])[:, None]
  scores = jnp.einsum("bthw,bshw->bhts", q, k) / w**0.5
  odds = jnp.where(visible, jnp.exp(jnp.where(visible, scores, 0)), 0)
  odds = odds / jnp.maximum(odds.sum(-1, keepdims=True), 1e-30)
  mixed = jnp.einsum("bhts,bshw->bthw", odds, v).reshape(batch, tokens, -1)
  return mixed @ module.out.kernel.get_value() * live[..., None]


def mlp(module, x, level=None):
  """An `Mlp`, or the first `level` learners of an ACM (all if not given)."""
  if hasattr(module, "learners"):
    count = module.count
    level = np.full(x.shape[:-1], count) if level is None else level
    parts = [
      mlp(jax.tree.map(lambda a: a[i], module.learners), x)  # noqa: B023
      for i in range(count)
    ]
    return sum(p * (level > i)[..., None] for i, p in enumerate(parts))
  up = x @ module.up.kernel.get_value()
  if module.gate is None:
    hidden = module.activation(up)
  else:
    hidden = module.activation(x @ module.gate.kernel.get_value()) * up
  return hidden @ module.down.kernel.get_value()


def block(module, x, live=None, feed=True):
  """A `Block`; `feed` may be a mask of the tokens that its second half takes."""
  live = np.ones(x.shape[:2], bool) if live is None else live
  x = x + attention(module.attention, norm(module.norm_attention, x), live=live)
  take = (live & feed)[..., None]
  return x + jnp.where(take, mlp(module.mlp, norm(module.norm_mlp, x)), 0)


def layers_of(model):
  """The single layers, groups opened."""
  stacked = model.layers
  count = jax.tree.leaves(stacked)[0].shape[0]
  each = [jax.tree.map(lambda a: a[i], stacked) for i in range(count)]  # noqa: B023
  return [one for e in each for one in getattr(e, "layers", [e])]


def readout(model, x):
  x = norm(model.norm, x)
  if model.head is None:
    return x @ model.embedding.get_value().T
  return x @ model.head.kernel.get_value()


def decoder(model, tokens, *, layers=None, feed=None, mixed=True):
  """Logits after every token, all layers run densely.

  Args:
    layers: only these, by number.
    feed: only these keep their feed-forward half.
    mixed: whether Mixture-of-Depths layers take all tokens, or none.
  """
  x = model.embedding.get_value()[tokens]
  for i, layer in enumerate(layers_of(model)):
    if layers is not None and i not in layers:
      continue
    fed = feed is None or i in feed
    if not hasattr(layer, "router"):
      x = block(layer, x, feed=fed)
    elif mixed:
      x = x + score(layer.router, x) * (block(layer.block, x, feed=fed) - x)
  return readout(model, x)


def score(router, x):
  """A linear `Router`."""
  return x @ router.outer.kernel.get_value() + router.outer.bias.get_value()
