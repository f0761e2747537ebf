# SPDX-License-Identifier: Apache-2.0
r"""Mixture-of-Recursions: a token passes a shared block as often as it needs.

Bae et al., 2025, https://arxiv.org/abs/2507.10524

One block f recurs up to N times; each time the tokens that stay move by

    h <- h + g (f(h) - h).

*Expert choice*: recursion r takes, of the tokens that stayed so far, the k_r =
ceil(c_r T) best by its router, c = N/N, .., 2/N, 1/N, and g is the sigmoid of
the score.  Top-k sees the future, so generation asks a small predictor of it,
trained beside.  *Token choice*: at entry a router gives a token its number of
recursions, the most likely one, and g is that probability; a balance loss keeps
all numbers in use.  A recursion attends to the keys of the tokens that are in
it or, `sharing`, to those of the first: 1/N of the cache.

Primitive: static chunks in training by expert choice, else the `live` mask.
Departs: f is the block's change of its input, and by token choice g weighs all
recursions; the predictor's loss has weight 1; the `Setting` is ours.
Axes: N recursions, B batch, T tokens, D features.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.losses import binary_cross_entropy
from adaptivejax.core.select import threshold, top_k
from adaptivejax.nn.block import Block, Layer, LayerOutput, only
from adaptivejax.nn.chosen import check_whole, on_chosen
from adaptivejax.nn.router import Router
from adaptivejax.nn.setting import Setting


class MixtureOfRecursions(Layer):
  """A layer that recurs behind learned routers; call it like a layer.

  Args:
    block: what recurs; with `sharing` a `Block`.
    features: D.
    recursions: N.
    routing: who chooses, the recursion (`expert`) or the token.
    sharing: all recursions read the keys of the first.
    balance: weight of the balance loss of token choice.
    rngs: for the routers.
  """

  def __init__(
    self,
    block: Layer,
    features: int,
    *,
    recursions: int = 3,
    routing: Literal["expert", "token"] = "expert",
    sharing: bool = False,
    balance: float = 0.1,
    rngs: nnx.Rngs,
  ):
    if recursions < 1 or routing not in ("expert", "token"):
      raise ValueError(
        f"{recursions=} must be at least 1, and {routing=} expert or token."
      )
    if sharing and not isinstance(block, Block):
      raise ValueError(
        "`sharing` needs a `Block`, which can recall its keys; got"
        f" {type(block).__name__}."
      )
    self.block, self.recursions = block, recursions
    self.routing, self.sharing, self.balance = routing, sharing, balance
    self.router = Router(features, recursions, rngs=rngs)
    hidden = max(8, features // 4)
    self.predictor = (
      Router(features, recursions, hidden=hidden, rngs=rngs)
      if routing == "expert"
      else None
    )
    self.level = Setting(jnp.zeros(()))
    self.depth = block.depth * (1 if sharing else recursions)

  def depths(self, x: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """Token choice: recursions of each token, 1..N; `level` taxes each."""
    tax = self.level.get_value() * jnp.arange(self.recursions)
    return self.router.choose(x, tax) + 1

  def stays(self, r: int, x: Float[Array, "B T D"]) -> Bool[Array, "B T"]:
    """Expert choice, causal: whether recursion r would take the tokens."""
    return threshold(self._guess(r, x), self.level.get_value())

  def _guess(self, r, x):
    assert self.predictor is not None, "only expert choice has to guess"
    return self.predictor(jax.lax.stop_gradient(x))[..., r]

  def __call__(
    self, x, positions, cache=None, index=0, live=None, key=None
  ) -> LayerOutput:
    if key is not None and self.routing == "expert":
      return self._train(x, positions, cache, live, key)
    keys, index = self._keys(x, cache, index)
    chosen, cost, inner, shares = live, Cost.zero(), [], []
    by_token, entry = self.routing == "token", only(live, x)
    depth, odds = self.depths(entry), jax.nn.softmax(self.router(entry))
    chance = jnp.take_along_axis(odds, depth[..., None] - 1, -1)
    train = by_token and key is not None
    penalty = self.balance * _imbalance(odds, depth) if train else 0.0
    for r in range(self.recursions):
      if by_token:
        chosen, gate = (_and(live, depth > r) if r else live), chance
        shares.append(odds[..., r:].sum(-1).mean())
      else:
        chosen = _and(chosen, self.stays(r, x)) if r else live
        gate = self._gate(r, only(chosen, x))
        shares.append(1.0 if chosen is None else chosen.mean())
      y, keys, spent, signals = self._recur(
        r, x, positions, keys, index, chosen, key
      )
      x = x + gate * only(chosen, y - x)
      cost, inner = cost + spent, [*inner, signals]
    cost = cost.with_overhead(self._asking(x))
    signals = _mean(inner, shares, penalty)
    return x, None if cache is None else keys, cost, signals

  def _train(self, x, positions, cache, live, key) -> LayerOutput:
    """Expert choice: the best of each sequence, in chunks of static size."""
    check_whole(cache, live)
    tokens = x.shape[1]
    keys, _ = self._keys(x, None, 0)
    kept = jnp.ones(x.shape[:2], bool)
    cost, inner, shares, penalty = Cost.zero(), [], [], jnp.float32(0)
    for r in range(self.recursions):
      k = -(-tokens * (self.recursions - r) // self.recursions)  # ceil(c_r T)
      if r:
        before, score = kept, self.router(x)[..., r]
        kept = top_k(jnp.where(before, score, -jnp.inf), k)
        wrong = binary_cross_entropy(self._guess(r, x), kept)
        wrong = jnp.where(before, wrong, 0)
        penalty += wrong.sum() / before.sum() / (self.recursions - 1)
      block = functools.partial(
        self._recur, r, cache=keys, index=0, live=None, key=key
      )
      gate = functools.partial(self._gate, r)
      x, keys, spent, signals = on_chosen(block, gate, x, positions, kept, k)
      cost += spent
      inner, shares = [*inner, signals], [*shares, k / tokens]
    cost = cost.with_overhead(self._asking(x))
    return x, None, cost, _mean(inner, shares, penalty)

  def _gate(self, r: int, x):
    """Expert choice: the weight of the r-th change."""
    return jax.nn.sigmoid(self.router(x)[..., r : r + 1])

  def _recur(
    self, r: int, x, positions, cache, index, live, key
  ) -> LayerOutput:
    """The block, the r-th time."""
    key = None if key is None else jax.random.fold_in(key, r)
    if self.sharing and r and isinstance(self.block, Block):
      return self.block.recall(x, positions, cache, index, live, key)
    index = index if self.sharing else index + r * self.block.depth
    return self.block(x, positions, cache, index, live, key)

  def _keys(self, x, cache: KVCache | None, index):
    """Where the first recursion leaves its keys for the others to read."""
    block = self.block
    if cache is not None or not self.sharing or not isinstance(block, Block):
      return cache, index
    return block.attention.empty_cache(x), 0

  def _asking(self, x) -> float:
    """FLOPs of the decisions."""
    if self.predictor is None:
      return flops(lambda m, x: m.router(x), self, x)
    ask = lambda m, x: (m.router(x), m.predictor(x))
    return self.recursions * flops(ask, self, x)


def _and(live, stays):
  return stays if live is None else live & stays


def _mean(inner: list[Signals], shares: list, penalty) -> Signals:
  """Of all recursions, by the share of the tokens in them."""
  share = sum(s * one.share for s, one in zip(shares, inner)) / len(inner)
  penalty += sum(one.penalty for one in inner) / len(inner)
  return Signals(jnp.asarray(share, jnp.float32), jnp.float32(penalty))


def _imbalance(odds: Float[Array, "B T N"], depth: Int[Array, "B T"]):
  """1 where all depths are used alike, N where one is (Fedus et al., 2021)."""
  count = odds.shape[-1]
  used = jax.nn.one_hot(depth - 1, count).mean((0, 1))
  return count * (used * odds.mean((0, 1))).sum()
