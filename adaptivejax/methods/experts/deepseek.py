# SPDX-License-Identifier: Apache-2.0
r"""DeepSeek-V3 MoE: the K best experts of the best groups, balanced by a bias.

DeepSeek-AI, 2024, https://arxiv.org/abs/2412.19437
Wang et al., 2024, https://arxiv.org/abs/2408.15664

With s = sigmoid(W x) and a bias b per expert, the groups of highest sum of
their two largest s_i + b_i stay, and of their experts the K of highest
s_i + b_i are chosen (sec. 2.1.2, eqs. 13-16):

    y = sum_shared E(x) + scale sum_chosen s_i / (sum_chosen s_j) E_i(x)

The bias has no part in the weights, hence no gradient of the task.  After each
step b_i falls by a fixed rate where expert i had more than the mean load, and
rises where it had less: here that is sign descent on the gradient of a penalty
of value 0 (`core.losses.excess_load`), which is how `training.optimizer`
treats every parameter named `load_bias`.
In each sequence sum_i f_i P_i is kept low besides (eqs. 17-20), f_i = E / K
times the share of its tokens that chose i, P_i their mean s_i / sum_j s_j.

Primitive: `expert_apply`; the shared expert is that of `nn.MixtureOfExperts`.
Departs: f_i counts the choices made, the bias included.  The load behind the
bias is per token of the call, which changes no sign.  A `Setting` leaves out
that many of the K choices; it is ours.
Axes: T tokens, D features, E experts, G groups, K choices.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.dispatch import check_count, load
from adaptivejax.core.losses import excess_load, load_balance
from adaptivejax.core.select import best, top_k
from adaptivejax.nn.experts import Routing
from adaptivejax.nn.linear import linear
from adaptivejax.nn.routing import (
  fewer_choices,
  only_live,
  renormalise,
  router_logits,
  weights_of,
)
from adaptivejax.nn.setting import Setting


class DeepSeekRouter(nnx.Module):
  """Group-limited sigmoid routing, a router of `nn.MixtureOfExperts`.

  Args:
    features: D.
    experts: E.
    top_k: K.
    groups, kept_groups: G, and those of them that a token chooses from.
    scale, balance: factors on the weights and on the sequence-wise loss.
    rngs: for the parameters.
  """

  def __init__(
    self,
    features: int,
    experts: int,
    *,
    top_k: int = 8,
    groups: int = 1,
    kept_groups: int = 1,
    scale: float = 2.5,
    balance: float = 1e-4,
    rngs: nnx.Rngs,
  ):
    if groups < 1 or experts % groups or not 1 <= kept_groups <= groups:
      raise ValueError(
        f"{groups=} must divide {experts=}, and {kept_groups=} be among them."
      )
    check_count(kept_groups * experts // groups, top_k)
    self.gate = linear(features, experts, rngs=rngs)
    self.load_bias = nnx.Param(jnp.zeros(experts))
    self.fewer = Setting(jnp.zeros(()))
    self.count = experts
    self.top_k, self.groups, self.kept_groups = top_k, groups, kept_groups
    self.scale, self.balance = scale, balance

  def choose(self, scores: Float[Array, "*N E"]) -> Int[Array, "*N K"]:
    """The choices, the best first; scores are unbiased."""
    biased = scores + self.load_bias.get_value().astype(jnp.float32)
    split = biased.reshape(*biased.shape[:-1], self.groups, -1)
    two = jax.lax.top_k(split, min(2, split.shape[-1]))[0].sum(-1)
    kept = top_k(two, self.kept_groups)[..., None]
    limited = jnp.where(kept, split, -jnp.inf).reshape(biased.shape)
    return best(limited, self.top_k)

  def __call__(
    self,
    x: Float[Array, "*N D"],
    live: Bool[Array, "*N"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> Routing:
    del key
    scores = jax.nn.sigmoid(router_logits(self.gate, x))
    experts = only_live(self.choose(scores), live)
    experts = fewer_choices(experts, self.fewer.get_value())
    weights = self.scale * renormalise(weights_of(scores, experts))
    penalty = self._penalty(scores, experts, live)
    return Routing(experts, weights, penalty, jnp.float32(0))

  def _penalty(self, scores, experts, live) -> Float[Array, ""]:
    live = jnp.ones(experts.shape[:-1], bool) if live is None else live
    rows = lambda a: a.reshape(-1, live.shape[-1], *a.shape[live.ndim :])
    share = rows(renormalise(scores))
    each = jax.vmap(load_balance)(share, rows(experts), rows(live))
    taken = load(experts, self.count) / live.size
    excess = excess_load(self.load_bias.get_value(), taken - taken.mean())
    return self.balance * each.mean() / self.top_k + excess
