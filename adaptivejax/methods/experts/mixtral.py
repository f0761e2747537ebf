# SPDX-License-Identifier: Apache-2.0
r"""Mixtral: a token runs its K best of E experts, weights summing to one.

Jiang et al., 2024, https://arxiv.org/abs/2401.04088

    y = sum_{i in top-K(W x)} softmax(top-K(W x))_i E_i(x)

with SwiGLU experts, K = 2 of E = 8; nothing is dropped.  The softmax over the
chosen logits is the softmax over all of them, renormalised over the chosen.
Without `renormalised` the weights stay what they are: Qwen3-MoE's
`norm_topk_prob=False` (Yang et al., 2025, https://arxiv.org/abs/2505.09388).
To the loss comes 0.001 E sum_i f_i P_i, see `core.router_losses.load_balance`.

Primitive: `expert_apply`.
Departs: the paper does not state its balance loss; this is the one, with the
weight, of the published model code (Hugging Face).  A `Setting` leaves out that
many of the K choices, so that a model trained with K is served with fewer,
layer by layer if wished, as if K had been smaller; it is ours.
Axes: D features, E experts, K choices.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from adaptivejax.core.dispatch import check_count
from adaptivejax.core.router_losses import load_balance
from adaptivejax.core.select import best
from adaptivejax.nn.linear import linear
from adaptivejax.nn.routing import Routing, fewer_choices, router_logits
from adaptivejax.nn.setting import Setting


class MixtralRouter(nnx.Module):
  """Top-K softmax routing, a router of `nn.MixtureOfExperts`.

  Args:
    features: D.
    experts: E.
    top_k: K.
    renormalised: whether the weights of the chosen sum to 1.
    balance: weight of the balance loss.
    rngs: for the parameters.
  """

  def __init__(
    self,
    features: int,
    experts: int,
    *,
    top_k: int = 2,
    renormalised: bool = True,
    balance: float = 0.001,
    rngs: nnx.Rngs,
  ):
    check_count(experts, top_k)
    self.gate = linear(features, experts, rngs=rngs)
    self.fewer = Setting(jnp.zeros(()))
    self.count = experts
    self.top_k = top_k
    self.renormalised = renormalised
    self.balance = balance

  def __call__(
    self,
    x: Float[Array, "*N D"],
    live: Bool[Array, "*N"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> Routing:
    del key
    p = jax.nn.softmax(router_logits(self.gate, x))
    experts = fewer_choices(best(p, self.top_k), self.fewer.get_value())
    penalty = self.balance * load_balance(p, experts, live)
    return Routing.of(
      p, experts, live, renormalised=self.renormalised, penalty=penalty
    )
