# SPDX-License-Identifier: Apache-2.0
"""What the models mean: no cache, no conditional, no scan, layer by layer.

Plain `jnp` on whole sequences, written apart from the library: it reads only
the parameters of its modules.

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


def attention(
  module, x, live=None, seen=None, both_ways=False, memory=None, pairs=None
):
  """From live tokens to seen ones at or before them; zero for the others.

  `both_ways`: every token has position 0, as in `models.classifier`.  Keys are
  made of `memory`, or of `x`.  Of all these pairs, those in `pairs` bool[T, T]
  see one another.
  """
  batch, tokens, _ = x.shape
  live = _all(x) if live is None else live
  seen = live if seen is None else seen
  order = np.zeros(tokens) if both_ways else np.arange(tokens)
  positions = np.broadcast_to(order, (batch, tokens))
  w = module.width
  q = (x @ module.query.kernel.get_value()).reshape(batch, tokens, -1, w)
  kv = (x if memory is None else memory) @ module.key_value.kernel.get_value()
  k, v = jnp.split(kv.reshape(batch, tokens, -1, w), 2, axis=2)
  q, k = rotate(q, positions), rotate(k, positions)
  share = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, share, axis=2), jnp.repeat(v, share, axis=2)
  visible = order[None, :] <= order[:, None]
  visible = visible if pairs is None else visible & pairs
  visible = (visible & seen[:, None, :] & live[:, :, None])[:, None]
  scores = jnp.einsum("bthw,bshw->bhts", q, k) / w**0.5
  odds = jnp.where(visible, jnp.exp(jnp.where(visible, scores, 0)), 0)
  odds = odds / jnp.maximum(odds.sum(-1, keepdims=True), 1e-30)
  mixed = jnp.einsum("bhts,bshw->bthw", odds, v).reshape(batch, tokens, -1)
  return mixed @ module.out.kernel.get_value() * live[..., None]


def mlp(module, x, level=None):
  """An `Mlp` where level > 0, or the first `level` learners of an ACM."""
  level = np.full(x.shape[:-1], 99) if level is None else level
  if hasattr(module, "learners"):
    return sum(
      mlp(jax.tree.map(lambda a, i=i: a[i], module.learners), x, level > i)
      for i in range(module.count)
    )
  hidden = x @ module.up.kernel.get_value()
  if module.gate is None:
    hidden = module.activation(hidden)
  else:
    hidden = module.activation(x @ module.gate.kernel.get_value()) * hidden
  y = hidden @ module.down.kernel.get_value()
  return jnp.where((level > 0)[..., None], y, 0)


def experts(module, x, gates):
  """Every one of stacked `Mlp`s on every item, weighted by gates [..., E]."""
  each = range(gates.shape[-1])
  return sum(
    gates[..., e, None] * mlp(jax.tree.map(lambda a, e=e: a[e], module), x)
    for e in each
  )


def block(
  module,
  x,
  live=None,
  seen=None,
  level=None,
  both_ways=False,
  memory=None,
  pairs=None,
):
  """A `Block` on the live tokens; the others pass.

  The keys are those of its input `memory`, or of `x`.
  """
  live = _all(x) if live is None else live
  level = np.full(x.shape[:2], 99) if level is None else level
  h = norm(module.norm_attention, x)
  if memory is not None:
    memory = norm(module.norm_attention, memory)
  x = x + attention(module.attention, h, live, seen, both_ways, memory, pairs)
  return x + mlp(module.mlp, norm(module.norm_mlp, x), level * live)


def layer(module, x, live=None, seen=None, level=None, pairs=None):
  """A `Block`, or one in a `MixtureOfDepths`: the change times the router."""
  if not hasattr(module, "router"):
    return block(module, x, live, seen, level, pairs=pairs)
  change = block(module.block, x, live, seen, level) - x
  return x + score(module.router, x) * change


def recursions(module, x, live=None):
  """A `MixtureOfRecursions` whose r-th recursion takes the tokens `live[r]`."""
  first = x
  entry = jax.nn.softmax(score(module.router, x), -1)
  live = [_all(x)] * module.recursions if live is None else live
  last = np.sum(live, 0)[..., None] - 1
  for r, mask in enumerate(live):
    if module.routing == "token":
      gate = jnp.take_along_axis(entry, last, -1)
    else:
      gate = jax.nn.sigmoid(score(module.router, x)[..., r : r + 1])
    shared = {"seen": live[0], "memory": first} if module.sharing else {}
    x = x + gate * (block(module.block, x, mask, **shared) - x)
  return x


def score(router, x):
  """A linear `Router`."""
  return x @ router.outer.kernel.get_value() + router.outer.bias.get_value()


def layers_of(model):
  """The single layers, groups opened."""
  count = jax.tree.leaves(model.layers)[0].shape[0]
  pick = lambda i: jax.tree.map(lambda a: a[i], model.layers)
  return [one for i in range(count) for one in _open(pick(i))]


def hidden(model, tokens, live=None, seen=None, level=None, pairs=None):
  """The hidden state after every layer.

  Args:
    live: bool[L, B, T], tokens that a layer computes (all).
    seen: bool[L, B, T], tokens that have a key there (the live ones).
    level: i32[L, B, T], learners that a token uses there (all); 0 skips the
      feed-forward half.
    pairs: bool[T, T], or [L, T, T]: queries and keys that may see one another
      (all).
  """
  x = model.embedding.get_value()[tokens]
  states = []
  for i, module in enumerate(layers_of(model)):
    at = lambda a, i=i: None if a is None else a[i]
    here = pairs if pairs is None or pairs.ndim == 2 else pairs[i]
    x = layer(module, x, at(live), at(seen), at(level), here)
    states.append(x)
  return states


def readout(model, x):
  x = norm(model.norm, x)
  if model.head is None:
    return x @ model.embedding.get_value().T
  return x @ model.head.kernel.get_value()


def decoder(model, tokens, live=None, seen=None, level=None, pairs=None):
  """Logits after every token; arguments as in `hidden`."""
  return readout(model, hidden(model, tokens, live, seen, level, pairs)[-1])


ROOM = 32


def next_logits(model, text, exit=-1):
  """Logits after the text i32[B, T], by the layers up to `exit`.

  Padded, one program serves all T < `ROOM` and exits.
  """
  text = np.asarray(text)
  padded = np.pad(text, ((0, 0), (0, ROOM - text.shape[1])))
  return _next_logits(model, padded, text.shape[1] - 1, exit)


@jax.jit
def _next_logits(model, text, last, exit):
  states = jnp.stack(hidden(model, text))
  return readout(model, states[exit, :, last])


def classifier(model, inputs):
  """`(logits [K, B, C], pooled [K, B, D])` of a `Classifier`."""
  embedding = model.embedding
  x = inputs @ embedding.kernel.get_value() + embedding.bias.get_value()
  x = x + model.places.get_value()
  exits = jax.tree.leaves(model.layers)[0].shape[0]
  logits, pooled = [], []
  for i in range(exits):
    pick = lambda tree, i=i: jax.tree.map(lambda a: a[i], tree)
    x = block(pick(model.layers), x, both_ways=True)
    say = pick(model.exits)
    pooled.append(x.mean(1))
    out = norm(say.norm, pooled[-1]) @ say.out.kernel.get_value()
    logits.append(out + say.out.bias.get_value())
  return jnp.stack(logits), jnp.stack(pooled)


def _all(x):
  return np.ones(x.shape[:2], bool)


def _open(module):
  return getattr(module, "layers", [module])
