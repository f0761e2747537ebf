# SPDX-License-Identifier: Apache-2.0
r"""DeepSeek-V3 MoE: the K best experts of the best groups, balanced by a bias.

DeepSeek-AI, 2024, https://arxiv.org/abs/2412.19437
Wang et al., 2024, https://arxiv.org/abs/2408.15664
DeepSeek-AI, 2024 (V2), https://arxiv.org/abs/2405.04434

With s = sigmoid(W x) and a bias b per expert, the groups of highest sum of
their two largest s_i + b_i stay, and of their experts the K of highest
s_i + b_i are chosen (eqs. 13-16):

    y = sum_shared E(x) + scale sum_chosen s_i / (sum_chosen s_j) E_i(x)

The bias has no part in the weights, hence no gradient of the task.  After each
step b_i falls by a fixed rate where expert i had more than the mean load, and
rises where it had less: here that is sign descent on the gradient of a penalty
of value 0 (`core.router_losses.excess_load`), which is how `training.optimizer`
treats every parameter named `load_bias`.
In each sequence sum_i f_i P_i is kept low besides (eqs. 17-20), f_i = E / K
times the share of its tokens that chose i, P_i their mean s_i / sum_j s_j.
With `softmax` it is DeepSeek-V2: s = softmax(W x), no bias, groups by their
largest s_i, and weights that are scale s_i.

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

from adaptivejax.core.dispatch import check_count, expert_load
from adaptivejax.core.router_losses import excess_load, sequence_load_balance
from adaptivejax.core.select import best, top_k
from adaptivejax.nn.linear import linear
from adaptivejax.nn.routing import (
  Routing,
  fewer_choices,
  renormalise,
  router_logits,
)
from adaptivejax.nn.setting import Setting


class DeepSeekRouter(nnx.Module):
  """Group-limited routing, a router of `nn.MixtureOfExperts`.

  Args:
    features: D.
    experts: E.
    top_k: K.
    groups, kept_groups: G, and those of them that a token chooses from.
    softmax: whether to score as DeepSeek-V2 does (static).
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
    softmax: bool = False,
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
    self.load_bias = None if softmax else nnx.Param(jnp.zeros(experts))
    self.fewer = Setting(jnp.zeros(()))
    self.count, self.top_k = experts, top_k
    self.groups, self.kept_groups = groups, kept_groups
    self.softmax, self.scale, self.balance = softmax, scale, balance

  def choose(self, scores: Float[Array, "*B T E"]) -> Int[Array, "*B T K"]:
    """The choices, the best first; scores are unbiased."""
    if self.load_bias is not None:
      scores = scores + self.load_bias.get_value().astype(jnp.float32)
    split = scores.reshape(*scores.shape[:-1], self.groups, -1)
    group = split.max(-1)
    if not self.softmax and split.shape[-1] > 1:
      first = jnp.arange(split.shape[-1]) == split.argmax(-1)[..., None]
      group += jnp.where(first, -jnp.inf, split).max(-1)
    kept = top_k(group, self.kept_groups)[..., None]
    limited = jnp.where(kept, split, -jnp.inf).reshape(scores.shape)
    return best(limited, self.top_k)

  def __call__(
    self,
    x: Float[Array, "*B T D"],
    live: Bool[Array, "*B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> Routing:
    del key
    score = jax.nn.softmax if self.softmax else jax.nn.sigmoid
    scores = score(router_logits(self.gate, x))
    experts = fewer_choices(self.choose(scores), self.fewer.get_value())
    routing = Routing.of(
      scores, experts, live, renormalised=not self.softmax, scale=self.scale
    )
    penalty = self._penalty(scores, routing.experts, live)
    return routing._replace(penalty=penalty)

  def _penalty(self, scores, experts, live) -> Float[Array, ""]:
    even = sequence_load_balance(renormalise(scores), experts, live)
    penalty = self.balance * even / self.top_k
    if self.load_bias is not None:
      bias = self.load_bias.get_value()
      items = experts[..., 0].size if live is None else live.sum()
      taken = expert_load(experts, self.count) / jnp.maximum(items, 1)
      penalty += excess_load(bias, taken - taken.mean())
    return penalty
