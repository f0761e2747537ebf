# SPDX-License-Identifier: Apache-2.0
r"""Mixture-of-Depths: each block spends its compute on k of the T tokens.

Raposo et al., 2024, https://arxiv.org/abs/2404.02258

A linear router scores the tokens, r_i = w . x_i, and the block f runs on the
k = ceil(c T) of highest score; the others take the residual path (eq. 1):

    x_i <- x_i + r_i f(X_top)_i   if i in top-k(r),   else   x_i

Attention inside f sees selected tokens only.  Top-k looks into the future, so
generation decides by a small predictor of "is in the top-k", trained by
cross-entropy on stopped gradients (sec. 3.5): causal, token by token.  Its
threshold is a `Setting`, 0 after training, so that the budget can be moved.

Departs: f is the block's change of its input; the router has a bias; the
predictor's loss has weight 1 and its threshold may be moved; when generating,
attention scores are computed for all queries and masked.
Primitive: one static chunk in training; the `live` mask (`bucketed`) after it.
Axes: B batch, T tokens, K tokens kept, D features.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from adaptivejax.core.cost import Signals, flops
from adaptivejax.core.losses import binary_cross_entropy
from adaptivejax.core.select import threshold, top_k
from adaptivejax.nn.block import Layer, LayerOutput
from adaptivejax.nn.chosen import check_whole, on_chosen
from adaptivejax.nn.router import Router
from adaptivejax.nn.setting import Setting


class MixtureOfDepths(Layer):
  """A layer behind a learned router; call it like the layer itself.

  Given a `key` (training) it takes the top-k of each sequence; without, it asks
  the predictor, which gives the same result for a prompt at once and token by
  token.  `norm` makes that of what these two read; none if not given.
  """

  def __init__(
    self,
    block: Layer,
    features: int,
    *,
    capacity: float = 0.125,
    norm: Callable[[int], nnx.Module] | None = None,
    rngs: nnx.Rngs,
  ):
    if not 0 < capacity <= 1:
      raise ValueError(
        f"{capacity=} must be a share of the tokens in (0, 1]; for no tokens"
        " at all leave the block out."
      )
    self.block = block
    hidden = max(8, features // 4)
    self.router = Router(features, norm=norm, rngs=rngs)
    self.predictor = Router(features, hidden=hidden, norm=norm, rngs=rngs)
    self.level = Setting(jnp.zeros(()))
    self.capacity = capacity
    self.depth = block.depth

  def decide(self, x: Float[Array, "B T D"]) -> Bool[Array, "B T"]:
    """The causal decision: tokens that this layer computes."""
    score = self.predictor(jax.lax.stop_gradient(x))[..., 0]
    return threshold(score, self.level.get_value())

  def _asking(self, x) -> float:
    """FLOPs of the decision."""
    return flops(lambda m, x: (m.predictor(x), m.router(x)), self, x)

  def __call__(
    self, x, positions, cache=None, index=0, live=None, key=None
  ) -> LayerOutput:
    if key is not None:
      return self._train(x, positions, cache, index, live, key)
    chosen = self.decide(x)
    chosen = chosen if live is None else chosen & live
    y, cache, cost, signals = self.block(x, positions, cache, index, chosen)
    taken = chosen[..., None]
    weight = self.router(jnp.where(taken, x, 0))
    asked = self._asking(x)
    cost = cost.with_overhead(asked)
    change = jnp.where(taken, y - x, 0)
    return x + weight * change, cache, cost, signals

  def _train(self, x, positions, cache, index, live, key) -> LayerOutput:
    check_whole(cache, live)
    tokens = x.shape[1]
    k = math.ceil(self.capacity * tokens - 1e-9)  # .07 * 100 is above 7
    chosen = top_k(self.router(x)[..., 0], k)
    block = lambda x, place: self.block(x, place, None, index, None, key)
    y, _, cost, signals = on_chosen(block, self.router, x, positions, chosen, k)
    guess = self.predictor(jax.lax.stop_gradient(x))[..., 0]
    penalty = binary_cross_entropy(guess, chosen).mean()
    cost = cost.with_overhead(self._asking(x))
    share = jnp.float32(k / tokens)
    signals = Signals(share * signals.share, penalty + signals.penalty)
    return y, None, cost, signals
