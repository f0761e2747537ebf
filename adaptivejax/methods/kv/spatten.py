# SPDX-License-Identifier: Apache-2.0
r"""SpAtten: what a layer finds unimportant, no later layer looks at.

Wang et al., 2020, https://arxiv.org/abs/2012.09852

With a_hij the attention of query i to key j in head h, and o_hi what the query
found, tokens and heads gather importance (alg. 1)

    s_j += sum_{h, i} a_hij,        t_h += sum_i |o_hi|

over all layers and all queries so far.  After each layer, of the tokens and the
heads that are left, the shares p and r of least importance are pruned: in the
layers to come such a token has no key and, in a prompt, no query; such a head
finds nothing.  So what is left shrinks from layer to layer, and each new token
starts with all again.

Primitive: `decode_chosen` with its mass, `top_k`; the cascade is carried in the
cache, as the memory of layer 0, whichever layers run.
Departs: heads that share keys are pruned together.  The last `recent` tokens
stay, as in the code published for language models: the young have had little
attention so far.  A prompt is computed dense and masked, and pruned tokens keep
their feed-forward half.  No local pruning of values, no progressive
quantisation.
Axes: B batch, T tokens, S slots, H query heads, G key heads.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from adaptivejax.core.attention import Keys, attend_with_mass
from adaptivejax.core.cache import KVCache
from adaptivejax.core.cascade import Cascade
from adaptivejax.core.chosen_decode import decode_chosen
from adaptivejax.core.cost import Cost
from adaptivejax.nn.look import Look, Looked, look_cost
from adaptivejax.nn.setting import Setting, refuse_nan, refuse_outside


class SpAtten(Look):
  """A look that prunes from layer to layer; see `nn.with_look`.

  Args:
    tokens: p, the share of tokens that a layer gives up, in 0..1.
    heads: r, the share of key heads, in 0..1.
    recent: last tokens, which stay (static).

  Both shares are `Setting`s, one for each layer: 0 prunes nothing, 1 leaves the
  recent and a head.
  """

  alone = True
  learns = True

  def __init__(
    self, tokens: float = 0.0, heads: float = 0.0, *, recent: int = 1
  ):
    refuse_nan(tokens=tokens, heads=heads)
    refuse_outside(0, 1, "being shares", tokens=tokens, heads=heads)
    if recent < 1:
      raise ValueError(f"{recent=} must be at least 1: the token itself.")
    self.recent = recent
    self.tokens = Setting(jnp.float32(tokens))
    self.heads = Setting(jnp.float32(heads))

  def memory(self, batch, heads, slots, width, dtype) -> Cascade:
    del width, dtype
    return Cascade.empty(batch, slots, heads)

  def __call__(self, *args, **how) -> Looked:
    raise ValueError(
      "SpAtten prunes by what the layers before found, which is handed on in a"
      " cache, by `step` alone: call the model with"
      " `cache=model.empty_cache(batch, tokens)`."
    )

  def step(
    self, q, keys, positions, cache: KVCache, layer=0, *, x=None, live=None,
    key=None,
  ) -> tuple[Looked, KVCache]:  # fmt: skip
    del x, key
    cache, old = self.append(cache, layer, keys), cache.recollect(0)
    now, pos = old.begin(cache.length), cache.read(layer).pos[:, 0]
    slot = jnp.minimum(cache.positions(q.shape[1]), cache.slots - 1)
    pruned = jnp.take_along_axis(now.no_token, slot, axis=1)
    asking = jnp.where(pruned, -1, positions)
    chosen = ~(now.no_token[:, None] | now.no_head[..., None])  # [B, G, S]
    out, mass, cost = _attend(q, cache, layer, asking, chosen, live)
    now = now.observe(out, mass).prune(
      pos >= 0,
      pos > positions.max(1)[:, None] - self.recent,
      self.tokens.get_value(),
      self.heads.get_value(),
    )
    now = now.only_in((positions >= 0).any(1), old)
    return Looked(out, cost), cache.remember(0, now)


def _attend(
  q, cache: KVCache, layer, positions, chosen: Bool[Array, "B G S"], live
) -> tuple[Array, Float[Array, "B H S"] | None, Cost]:
  """What queries find among the chosen keys, and what these got."""
  cost = look_cost(q, cache.slots, live)
  if q.shape[1] == 1:
    every, at = Keys(cache.k, cache.v, cache.pos), jnp.asarray(layer)
    found, spent = decode_chosen(
      q, every, chosen, positions, layer=at, mass=True
    )
    cost = cost._replace(spent=spent.spent, bound=spent.bound)
    return found.out, found.mass, cost
  keys = cache.read(layer)
  only = keys._replace(pos=jnp.where(chosen, keys.pos, -1))
  return *attend_with_mass(q, only, positions), cost
