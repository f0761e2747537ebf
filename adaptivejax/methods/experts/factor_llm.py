# SPDX-License-Identifier: Apache-2.0
r"""FactorLLM: a trained layer cut into experts, of which a token runs a few.

Zhao et al., 2024, https://arxiv.org/abs/2408.11855

The neurons of a feed-forward layer f are dealt to E experts of equal size, so
that f = sum_i E_i exactly, and a linear router picks K of them:

    y = E / K sum_{i in top-K(r)} E_i(x),   r = W x + b

K = E is the layer.  While it is adapted, the layer before, f, teaches the
router which experts would have been best (Prior-Approximate loss):

    S = argmin_{|S| = K} || f(x) - sum_{i in S} E_i(x) ||^2,
    loss = 0.05 KL(softmax(r) | softmax(1_S)) + 0.01 balance

Primitive: `expert_apply`; `nn.split_mlp` cuts.
Departs: the released training ranks single experts, its code also holds the
search over subsets, which is here.  The sum in it is not scaled: scaled, half
of the experts and the other half would be equally near at the start.  Teacher
and experts see the same x, not one stream each.  The released balance term, the
mean probability of the chosen, spreads nothing: it is that of Switch here.  A
`Setting` leaves out that many of the K choices, or adds them where negative; it
is ours.
Axes: D features, F hidden neurons, E experts, K choices, S subsets of K.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.dispatch import NOBODY, check_count
from adaptivejax.core.router_losses import load_balance, router_divergence
from adaptivejax.core.select import top_k
from adaptivejax.core.subsets import best_subset, check_subsets
from adaptivejax.nn.block import only
from adaptivejax.nn.experts import apply_masked_experts, expert_signals
from adaptivejax.nn.mlp import Mlp, split_mlp
from adaptivejax.nn.router import Router
from adaptivejax.nn.setting import Setting, frozen


class FactorLLM(nnx.Module):
  """A feed-forward module made of a trained one; called like `nn.Mlp`.

  Args:
    mlp: the trained layer.
    experts: E, which divides its hidden neurons.
    top_k: K.
    order: of the neurons, those of an expert in a row; as they stand, if not
      given.  See `nn.cluster_neurons`.
    prior, balance: weights of the losses; without `prior` no teacher is kept,
      subsets may be many, and training computes what was chosen only.
    rngs: for the router.
  """

  def __init__(
    self,
    mlp: Mlp,
    experts: int,
    *,
    top_k: int = 2,
    order: Int[Array | np.ndarray, " F"] | None = None,
    prior: float = 0.05,
    balance: float = 0.01,
    rngs: nnx.Rngs,
  ):
    check_count(experts, top_k)
    if prior:
      check_subsets(experts, top_k)
    self.experts = split_mlp(mlp, experts, order)
    self.teacher = frozen(mlp) if prior else None
    self.router = Router(mlp.up.kernel.shape[0], experts, rngs=rngs)
    self.fewer = Setting(jnp.zeros(()))
    self.count, self.top_k = experts, top_k
    self.prior, self.balance = prior, balance

  def choose(self, logits: Float[Array, "*N E"]) -> Bool[Array, "*N E"]:
    """The experts that run: the best K, but for `fewer`."""
    wanted = jnp.clip(self.top_k - self.fewer.get_value(), 0, self.count)
    return top_k(logits, wanted.round().astype(jnp.int32))

  def __call__(
    self,
    x: Float[Array, "*N D"],
    live: Bool[Array, "*N"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Float[Array, "*N D"], Cost, Signals]:
    x = only(live, x)
    logits = self.router(x).astype(jnp.float32)
    chosen = only(live, self.choose(logits))
    scale = self.count / jnp.maximum(chosen.sum(-1, keepdims=True), 1)
    gates = jnp.where(chosen, scale, 0).astype(x.dtype)
    penalty = 0.0
    if key is None or self.teacher is None:
      y, cost = apply_masked_experts(self.experts, x, chosen, gates)
    else:
      y, cost, best = self._teach(self.teacher, x, gates)
      penalty = self.prior * router_divergence(logits, best, live)
    if key is not None:
      p, each = jax.nn.softmax(logits), jnp.arange(self.count)
      listed = jnp.where(chosen, each, NOBODY)
      penalty += self.balance * load_balance(p, listed, live)
    asked = flops(lambda m, x: m(x), self.router, x)
    return y, cost.with_overhead(asked), expert_signals(chosen, penalty)

  def _teach(self, teacher, x, gates) -> tuple[Array, Cost, Array]:
    """All experts, weighted; what they and the teacher cost; the best K."""
    run = jax.vmap(Mlp.rows, in_axes=(0, None))
    parts, wanted = run(self.experts, x), teacher.rows(x)
    y = jnp.einsum("e...d,...e->...d", parts, gates)
    cost = Cost.dense(flops(run, self.experts, x), gates.size)
    cost = cost.with_overhead(flops(Mlp.rows, teacher, x))
    best = best_subset(*jax.lax.stop_gradient((parts, wanted)), self.top_k)
    return y, cost, best.astype(jnp.float32)
