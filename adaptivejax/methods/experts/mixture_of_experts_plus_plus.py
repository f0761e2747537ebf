# SPDX-License-Identifier: Apache-2.0
r"""MoE++: among the experts are some that compute nothing.

Jin et al., 2024, https://arxiv.org/abs/2410.07348
Meituan LongCat Team, 2025, https://arxiv.org/abs/2509.01322

A token chooses K of N FFN and Z zero-computation experts; so it runs 0 to K
FFN experts, weighted by g = softmax(W x) (eq. 1):

    zero(x) = 0,   copy(x) = x,   constant(x) = a_1 x + a_2 v,
    [a_1, a_2] = softmax(W_c x)                                     (eqs. 3-5)

To the loss comes beta sum_i eta_i f_i P_i, eta_i = 1 for FFN experts and tau for
the others (eq. 7): a small tau sends tokens to the latter.  In training FFN
experts take gamma tau T / (tau N + Z) tokens, the others 1 / tau times as many
(eq. 8).  LongCat-Flash has copies only, a factor on the weights, and instead of
the loss a bias on the choice, steered until a token runs `active` FFN experts
in the mean.

Primitive: `expert_apply` on FFN experts only; the others are elementwise.
Departs: no gating residuals (eq. 6), which need the router of the layer before.
The released code renormalises g without the zero expert's and doubles x; the
paper does neither.  A capacity is per sequence, and holds in training only.
LongCat's bias takes steps of sign descent (`core.losses.excess_load`), not of
its PID controller.  A `Setting`, added to the logits of zero-computation
experts, moves the budget; it is ours.
Axes: T tokens, D features, E = N + Z experts, K choices, S constant experts.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.dispatch import NOBODY, check_count
from adaptivejax.core.losses import excess_load, expert_use
from adaptivejax.core.select import best
from adaptivejax.nn.block import only
from adaptivejax.nn.experts import Routing, apply_experts
from adaptivejax.nn.linear import linear
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.routing import (
  dropped,
  only_live,
  router_logits,
  serve,
  weights_of,
)
from adaptivejax.nn.setting import Setting


class MoEPlusPlus(nnx.Module):
  """A feed-forward module of FFN and other experts; called like `nn.Mlp`.

  Experts are numbered FFN, zero, copy, constant.

  Args:
    experts: an `Mlp` whose parameters are stacked over N (`nn.stacked`).
    features: D.
    top_k: K.
    zero, copy, constant: experts of each kind; their sum is Z.
    scale: of the weights.
    active: FFN experts per token that the bias aims at; without, no bias.
    tau, balance, capacity_factor: tau, beta and gamma.
    rngs: for the parameters.
  """

  def __init__(
    self,
    experts: Mlp,
    features: int,
    *,
    top_k: int = 2,
    zero: int = 1,
    copy: int = 1,
    constant: int = 2,
    scale: float = 1.0,
    active: float | None = None,
    tau: float = 0.75,
    balance: float = 0.01,
    capacity_factor: float = 1.1,
    rngs: nnx.Rngs,
  ):
    self.experts = experts
    self.ffn = experts.down.kernel.shape[0]
    ...
