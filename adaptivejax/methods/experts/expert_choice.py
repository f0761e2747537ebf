# SPDX-License-Identifier: Apache-2.0
r"""Expert choice: each of E experts takes the tokens that score it best.

Zhou et al., 2022, https://arxiv.org/abs/2202.09368

    p = softmax(W x),   expert e takes its k = c T / E tokens of highest p_te,
    y_t = sum_{e takes t} p_te E_e(x_t)

All experts carry the same load, and a token runs 0 to E of them; the capacity
factor c is the mean.  Nothing needs balancing.

A choice among all tokens of a sequence sees those to come: a causal model
refuses this router, unless told that this is meant (`allow_noncausal`).

Primitive: `expert_choice`, `expert_apply`.
Departs: k is rounded up, of the live tokens of a sequence; tokens that are not
live are never taken (in published code they are multiplied by 0, and may take
the place of others).  A `Setting`, the share of its tokens that an expert
refuses, moves the budget; it is ours.
Axes: B batch, T tokens, D features, E experts.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from adaptivejax.core.dispatch import NOBODY, check_count
from adaptivejax.core.select import expert_choice
from adaptivejax.nn.linear import linear
from adaptivejax.nn.routing import Routing, router_logits
from adaptivejax.nn.setting import Setting


class ExpertChoiceRouter(nnx.Module):
  """Routing by the experts, a router of `nn.MixtureOfExperts`.

  Args:
    features: D.
    experts: E.
    capacity_factor: c, experts per token in the mean (static).
    allow_noncausal: let a causal model use it (static).  Token by token it is
      another function, and a dear one: all E experts take the only token.
    rngs: for the parameters.
  """

  def __init__(
    self,
    features: int,
    experts: int,
    *,
    capacity_factor: float = 2.0,
    allow_noncausal: bool = False,
    rngs: nnx.Rngs,
  ):
    check_count(experts, 1)
    if not 0 < capacity_factor <= experts:
      raise ValueError(
        f"{capacity_factor=} must lie in (0, {experts}]: so many experts run a"
        " token in the mean, and there are no more."
      )
    self.gate = linear(features, experts, rngs=rngs)
    self.refused = Setting(jnp.zeros(()))
    self.count = experts
    self.capacity_factor = capacity_factor
    self.looks_ahead = not allow_noncausal

  def __call__(
    self,
    x: Float[Array, "*B T D"],
    live: Bool[Array, "*B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> Routing:
    del key
    p = jax.nn.softmax(router_logits(self.gate, x))
    live = jnp.ones(p.shape[:-1], bool) if live is None else live
    items = live.sum(-1, dtype=jnp.float32)
    share = self.capacity_factor / self.count * (1 - self.refused.get_value())
    k = jnp.ceil(items * share - 1e-4)  # .07 * 100 is above 7
    k = jnp.clip(k, 0, p.shape[-2]).astype(jnp.int32)
    k = jnp.broadcast_to(k[..., None], (*k.shape, self.count))
    scores = jnp.where(live[..., None], p, -1)
    taken = expert_choice(scores, k)
    experts = jnp.where(taken, jnp.arange(self.count), NOBODY)
    return Routing.of(p, experts, live)
