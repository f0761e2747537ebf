# SPDX-License-Identifier: Apache-2.0
"""How the queries of an `Attention` look at keys, and what becomes of these.

`Look` looks at all.  A method on attention or on the cache is another: it may
choose keys, mark them, give them up, merge them or store them in fewer bits.
`Attention` makes queries, keys and values and asks its look for the rest:

* without a cache (training, encoders): `look(q, keys, positions, layer)`;
* with one: `look.step(q, keys, positions, cache, layer)`, where the keys are
  those of the new tokens; by itself it appends them, reads all and looks.

What a look knows from step to step is its memory, a part of the cache.  A token
of position -1 is none: it is not to be looked at, and what its query finds
means nothing.  Budgets are `Setting`s; `with_look` puts a look into a model
that is trained.

Axes: B batch, T tokens, S keys, H query heads, G key heads, W head width, D
features, L layers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys, attend
from adaptivejax.core.cache import KVCache, append
from adaptivejax.core.cost import Cost
from adaptivejax.core.per_device import (
  BATCH_AXES,
  Layout,
  auto_axes,
  dividing,
  on_each_device,
)
from adaptivejax.core.rope import USUAL, Rope


class Looked(NamedTuple):
  """What a look found.

  Attributes:
    out: f[B, T, H, W], the mixed values.
    cost: of scores and mixing, with what was spent on the choice; `full` is
      the dense twin's, over all keys it was given.
    penalty: the look's own auxiliary loss, the mean over rows of what each of
      them owes, f32[]; 0 where it has none.
  """

  out: Array
  cost: Cost
  penalty: Array | float = 0.0


class Look(nnx.Module):
  """Looks at all keys; the base of looks that do not.

  Class attributes say what a look needs of the cache, all static:

  Attributes:
    rotated: queries and keys come with their rotary positions applied; else the
      look has to apply them (`core.attention.rotary`), and the cache holds keys
      without.
    rope: the rotary positions of the model, which its `Attention` tells.
    per_head: key heads keep different keys, `pos` is [B, G, S].
    merges: a key may stand for several, so keys have a `bias`.
    coded: keys and values are stored in 8 bits, with a scale.
    evicts: keys are given up for new ones.  Such a look writes the cache
      itself, in `step`, and takes no token back: drafts refuse it.
    alone: a token that comes alone is looked after otherwise than among others,
      so drafts, which are checked together, refuse it.
    learns: it remembers what does not follow from the keys in the cache: how
      prompts were looked at, or other keys.
  """

  rotated: bool = True
  rope: Rope = USUAL
  per_head: bool = False
  merges: bool = False
  coded: bool = False
  evicts: bool = False
  alone: bool = False
  learns: bool = False

  @property
  def keeps_all(self) -> bool:
    """Whether it keeps all keys as they are, so that another look may read for
    it (`nn.ByPhase`, `nn.adopt_cache`).
    """
    return self.rotated and not (self.evicts or self.merges or self.learns)

  def turning(self, rope: Rope) -> "Look":
    """The look of a model with such rotary positions (static)."""
    if rope == self.rope:
      return self
    look = jax.tree.map(lambda a: a, self)  # a copy
    look.rope = rope
    return look

  def slots(self, slots: int) -> int:
    """Cache slots it needs where a text of `slots` tokens is to fit.

    All static; asked for its own answer, it answers the same.
    """
    return slots

  def memory(
    self, batch: int, heads: int, slots: int, width: int, dtype: DTypeLike
  ) -> Any:
    """What one layer remembers before it has seen anything, or None.

    A pytree with leaves [B, ...].  The arguments are G, S and W of the cache,
    static; `slots` is what `slots` answered.
    """
    del batch, heads, slots, width, dtype
    return None

  def empty_cache(
    self,
    layers: int,
    batch: int,
    heads: int,
    slots: int,
    width: int,
    dtype: DTypeLike,
  ) -> KVCache:
    """A cache in which such looks can keep texts of `slots` tokens (static)."""
    slots = self.slots(slots)
    return KVCache.empty(
      layers,
      batch,
      heads,
      slots,
      width,
      jnp.int8 if self.coded else dtype,
      per_head=self.per_head,
      merges=self.merges,
      evicts=self.evicts,
      memory=self.memory(batch, heads, slots, width, dtype),
    )

  def __call__(
    self,
    q: Float[Array, "B T H W"],
    keys: Keys,
    positions: Int[Array, "B T"],
    layer: Int[Array, ""] | int = 0,
    *,
    x: Float[Array, "B T D"] | None = None,
    live: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T S"] | None = None,
    key: Array | None = None,
  ) -> Looked:
    """What the queries find among the keys.

    Args:
      q: queries.
      keys: in any order.
      positions: of the queries, -1 where there is none.
      layer: which layer this is (dynamic).
      x: what the attention was given, for a look with weights of its own.
      live: tokens that are computed, for the cost; all if None.
      mask: pairs that may see one another, besides; all if None.
      key: given in training, asks for the differentiable form.
    """
    del layer, x, key
    out = attend(q, keys, positions, mask=mask)
    return Looked(out, look_cost(q, keys.k.shape[2], live))

  def append(
    self,
    cache: KVCache,
    layer: Int[Array, ""] | int,
    keys: Keys,
    rows: Bool[Array, " B"] | None = None,
  ) -> KVCache:
    """`core.cache.append`, and what the memory has to know of the keys."""
    return append(cache, layer, keys, rows)

  def step(
    self,
    q: Float[Array, "B T H W"],
    keys: Keys,
    positions: Int[Array, "B T"],
    cache: KVCache,
    layer: Int[Array, ""] | int = 0,
    *,
    x: Float[Array, "B T D"] | None = None,
    live: Bool[Array, "B T"] | None = None,
    key: Array | None = None,
  ) -> tuple[Looked, KVCache]:
    """Writes the keys of new tokens and looks, from these, at all so far.

    Args:
      keys: of the new tokens, S = T.
      cache: its `length` does not count them yet, nor will it here.

    Others as in a call.
    """
    cache = self.append(cache, layer, keys)
    looked = self.recall(q, positions, cache, layer, x=x, live=live, key=key)
    return looked, cache

  def recall(
    self,
    q: Float[Array, "B T H W"],
    positions: Int[Array, "B T"],
    cache: KVCache,
    layer: Int[Array, ""] | int = 0,
    *,
    x: Float[Array, "B T D"] | None = None,
    live: Bool[Array, "B T"] | None = None,
    key: Array | None = None,
  ) -> Looked:
    """Looks at what the cache holds, the tokens' own keys among them.

    Raises:
      ValueError: the look evicts, so that only `step` knows what is there.
    """
    if self.evicts:
      raise ValueError(
        f"{type(self).__name__} gives keys up as it reads, so what a layer"
        " wrote cannot be looked at again: use a look that keeps all keys."
      )
    keys, mask = cache.read(layer), tree_mask(cache, positions.shape[1])
    return self(q, keys, positions, layer, x=x, live=live, mask=mask, key=key)


class Coded(Look):
  """Looks at all keys, which the cache holds in 8 bits (`core.quantise`)."""

  coded = True


def tree_mask(cache: KVCache, tokens: int) -> Bool[Array, "B T S"] | None:
  """Which slots the new tokens may see, when they are a tree of drafts."""
  if cache.tree is None:
    return None
  node = jnp.arange(cache.slots) - cache.length[:, None]  # [B, S]
  new = (node >= 0) & (node < tokens)
  at = jnp.clip(node, 0, tokens - 1)[:, None]
  return jnp.take_along_axis(cache.tree, at, axis=2) | ~new[:, None]


def look_cost(
  q: Float[Array, "B T H W"],
  keys: float,
  live: Bool[Array, "B T"] | None = None,
  seen: Float[Array, ""] | float | None = None,
) -> Cost:
  """FLOPs of scores and mixing: each query with `seen` of `keys`, or with all.

  Args:
    q: queries.
    keys: that the dense twin computes for each query, seen or not (static).
    live: queries that were asked for; all if not given.
    seen: keys computed for a query, the mean, at most all (dynamic).
  """
  items = jnp.float32(q.shape[0] * q.shape[1])
  full = jnp.float32(4.0 * q.size * keys)
  spent = full if seen is None else 4.0 * q.size * jnp.float32(seen)
  asked = items if live is None else live.sum(dtype=jnp.float32)
  return Cost(spent, full, asked, items, jnp.float32(0), full)


def look_over_mesh(
  run: Callable[[Any, Any], tuple[Looked, Any]], items: Any, shared: Any
) -> tuple[Looked, Any]:
  """`run(items, shared)`: under an ambient mesh, of the rows of each device.

  So what a look sorts and chooses stays on the device (`core.per_device`); but
  not where the mesh splits heads or tokens besides, for an operation that is on
  each device for itself holds no other: then attention itself is on each device
  (`core.per_head`), and the compiler splits how a look chooses.

  Args:
    run: returns what was found and the cache, or None.
    items: arrays whose first axis is B.
    shared: what serves all rows.
  """
  mesh = auto_axes()
  layout = Layout(dividing(BATCH_AXES, items[0].shape[0]))
  split = {name for name, size in mesh.items() if size > 1}
  if not layout.axes or split - {*layout.axes}:
    return run(items, shared)
  devices = math.prod(mesh[name] for name in layout.axes)

  def local(items, shared):
    found, cache = run(items, shared)
    # devices hold equally many rows, and their shares are summed
    share = jnp.asarray(found.penalty, jnp.float32) / devices
    return (found.out, cache), (found.cost, share)

  (out, cache), (cost, penalty) = on_each_device(local, items, shared, layout)
  return Looked(out, cost, penalty), cache
