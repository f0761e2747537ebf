# SPDX-License-Identifier: Apache-2.0
r"""Dynamic top-p MoE: a token runs as many experts as its router is unsure of.

Huang et al., 2024, https://arxiv.org/abs/2403.07652

    P = softmax(W x),   S = the fewest experts, by falling P, that hold p of it,
    y = sum_{i in S} P_i E_i(x)

so a token whose router is sure of one expert runs that one.  Lest all P become
flat, and all experts run, the loss gets

    0.01 E sum_i f_i Q_i - 0.0001 sum_i P_i log P_i

the balance of Switch Transformer, f_i the tokens that run expert i, Q_i its
mean probability, and the entropy, mean over tokens.

Primitive: `top_p`, `expert_apply`.
Departs: equations and weights are from two summaries and the released inference
code, not from the paper's text (unverified).  A `Setting`, by which p is
lowered, moves the budget; it is ours.
Axes: D features, E experts.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from adaptivejax.core.dispatch import NOBODY, check_count
from adaptivejax.core.router_losses import load_balance, router_entropy
from adaptivejax.core.select import best, top_p
from adaptivejax.nn.linear import linear
from adaptivejax.nn.routing import Routing, router_logits
from adaptivejax.nn.setting import Setting, refuse_nan


class TopPRouter(nnx.Module):
  """Routing by probability mass, a router of `nn.MixtureOfExperts`.

  Args:
    features: D.
    experts: E.
    p: the mass (static; move it by the `Setting`); from 1 on all experts run,
      at 0 the best one.
    most: experts of a token at most, however unsure its router is (static): a
      hard limit on the work, which costs quality instead; E if not given.
    balance: weight of the balance loss.
    entropy: weight of the entropy.
    rngs: for the parameters.
  """

  def __init__(
    self,
    features: int,
    experts: int,
    *,
    p: float = 0.4,
    most: int | None = None,
    balance: float = 1e-2,
    entropy: float = 1e-4,
    rngs: nnx.Rngs,
  ):
    check_count(experts, experts if most is None else most)
    refuse_nan(p=p)
    self.gate = linear(features, experts, rngs=rngs)
    self.lowered = Setting(jnp.zeros(()))
    self.count = experts
    self.p = p
    self.most = most
    self.balance = balance
    self.entropy = entropy

  def __call__(
    self,
    x: Float[Array, "*N D"],
    live: Bool[Array, "*N"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> Routing:
    del key
    logits = router_logits(self.gate, x)
    p = jax.nn.softmax(logits)
    taken = top_p(p, self.p - self.lowered.get_value())
    experts = jnp.where(taken, jnp.arange(self.count), NOBODY)
    if self.most is not None:
      first = best(p, self.most)
      experts = jnp.take_along_axis(experts, first, axis=-1)
    penalty = self.balance * load_balance(p, experts, live)
    penalty += self.entropy * router_entropy(logits, live)
    return Routing.of(p, experts, live, penalty=penalty)
