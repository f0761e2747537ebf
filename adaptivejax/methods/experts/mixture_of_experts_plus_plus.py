# SPDX-License-Identifier: Apache-2.0
r"""MoE++: among the experts are some that compute nothing.

Jin et al., 2024, https://arxiv.org/abs/2410.07348
Meituan LongCat Team, 2025, https://arxiv.org/abs/2509.01322

A token chooses K of N FFN and Z zero-computation experts by g = softmax(W x)
(eqs. 1, 3-5; `nn.ZeroComputationExperts`), so that it runs 0 to K FFN experts.
To the loss comes beta sum_i eta_i f_i P_i (eq. 7), eta = 1 for FFN experts and
tau for others: a small tau sends tokens there.  In training FFN experts take
gamma tau T / (tau N + Z) tokens, the others gamma T / (tau N + Z) (eq. 8).
LongCat-Flash has copies only, a factor on g, no capacity, and for the loss a
bias on the choice of FFN experts, so that `active` of them run per token.

Primitive: `expert_apply` on FFN experts only; the others are elementwise.
Departs: no gating residuals (eq. 6): the logits of the layer before would have
to come with x from layer to layer, and a layer passes on nothing else.
The released code renormalises g without the zero expert's and doubles x; the
paper does not.  A capacity is per sequence, and holds in training only.  First
choices are served before second ones (GShard), so in training later tokens may
take the room of earlier ones.  Of LongCat's controller here is the sign of the
error: `load_bias` moves by fixed steps (`training.optimizer`).  A `Setting`,
subtracted from the logits of FFN experts, moves the budget; it is ours.
Axes: T tokens, D features, E = N + Z experts, K choices.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.dispatch import NOBODY, check_count
from adaptivejax.core.router_losses import excess_load, expert_use
from adaptivejax.core.select import best
from adaptivejax.nn.block import only
from adaptivejax.nn.experts import apply_experts
from adaptivejax.nn.linear import linear
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.routing import Routing, router_logits, serve
from adaptivejax.nn.setting import Setting
from adaptivejax.nn.zero_computation import ZeroComputationExperts


class MoEPlusPlus(nnx.Module):
  """A feed-forward module of FFN and other experts; called like `nn.Mlp`.

  Args:
    experts: an `Mlp` whose parameters are stacked over N (`nn.stacked`).
    features: D.
    top_k: K.
    kinds: experts that are zero, copy and constant, in this order after FFN.
    scale: of the weights.
    active: FFN experts per token that the bias aims at; without, no bias.
    tau, balance, capacity_factor: tau, beta, gamma (None drops nothing).
    rngs: for the parameters.
  """

  def __init__(
    self,
    experts: Mlp,
    features: int,
    *,
    top_k: int = 2,
    kinds: tuple[int, int, int] = (1, 1, 2),
    scale: float = 1.0,
    active: float | None = None,
    tau: float = 0.75,
    balance: float = 0.01,
    capacity_factor: float | None = 1.1,
    rngs: nnx.Rngs,
  ):
    self.experts, self.ffn = experts, experts.down.kernel.shape[0]
    self.others = ZeroComputationExperts(features, kinds, rngs=rngs)
    self.count = self.ffn + self.others.count
    check_count(self.count, top_k)
    if not (tau > 0 and (capacity_factor is None or capacity_factor > 0)):
      raise ValueError(f"{tau=} and {capacity_factor=} must be above 0.")
    self.gate = linear(features, self.count, rngs=rngs)
    zeros = jnp.zeros(self.count)
    self.load_bias = None if active is None else nnx.Param(zeros)
    self.lowered = Setting(jnp.zeros(()))
    self.top_k, self.scale, self.active = top_k, scale, active
    self.tau, self.balance, self.capacity_factor = tau, balance, capacity_factor

  def route(self, x, live=None, key=None) -> Routing:
    """Choices among all E experts."""
    low, ffn = self.lowered.get_value(), jnp.arange(self.count) < self.ffn
    tax = jnp.where(ffn, jnp.maximum(low, 0), jnp.maximum(-low, 0))
    p = jax.nn.softmax(router_logits(self.gate, x) - tax)  # one side untouched
    bias = None if self.load_bias is None else self.load_bias.get_value()
    wanted = best(p if bias is None else p + bias, self.top_k)
    experts, dropped = wanted, 0.0
    if key is not None and self.capacity_factor is not None:
      units = self.tau * self.ffn + self.others.count
      room = self.capacity_factor * x.shape[-2] / units
      room = jnp.ceil(jnp.where(ffn, self.tau, 1) * room - 1e-4)
      room = room.astype(jnp.int32)
      experts, dropped = serve(wanted, live, self.count, room)
    used, asked = expert_use(p, wanted, live)
    eta = jnp.where(ffn, 1, self.tau)
    penalty = self.balance * (eta * used * asked).sum()
    if bias is not None and self.active is not None:
      excess = (used - self.active / self.ffn) / self.top_k
      penalty = excess_load(bias, jnp.where(ffn, excess, 0))
    return Routing.of(
      p, experts, live, scale=self.scale, penalty=penalty, dropped=dropped
    )

  def __call__(
    self,
    x: Float[Array, "*B T D"],
    live: Bool[Array, "*B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Float[Array, "*B T D"], Cost, Signals]:
    x = only(live, x)
    routing = self.route(x, live, key)
    chosen = routing.experts[..., None] == jnp.arange(self.ffn, self.count)
    weights = jnp.where(chosen, routing.weights[..., None], 0).sum(-2)
    rest = self.others(x, weights)
    runs = (routing.experts < self.ffn) & (routing.weights > 0)
    ffn = routing._replace(experts=jnp.where(runs, routing.experts, NOBODY))
    y, cost, signals = apply_experts(self.experts, x, ffn, live, key)
    asked = flops(lambda m, x, w: (m.gate(x), m.others(x, w)), self, x, weights)
    return y + rest, cost.with_overhead(asked), signals
