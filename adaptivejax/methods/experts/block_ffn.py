# SPDX-License-Identifier: Apache-2.0
r"""BlockFFN: a token runs the experts that a ReLU leaves, as many as they are.

Song et al., 2025, https://arxiv.org/abs/2507.08771

    r = W x,   s = relu(r),   A = RMSNorm(s),
    y = sum_{i: s_i > 0} A_i down_i silu(up_i x)

The experts are many, narrow and not gated.  Where nothing is cut off, nothing
is approximated: A_i is 0 wherever expert i is left out.  Two losses make the
experts that c tokens in a row use few, p = s / sum_i s_i:

    sparsity  = mean over chunks, i of  1 - prod_{t in chunk} (1 - p_ti)
    locality  = mean over t, i of  BCE(sigmoid(a r_{t-1,i}), sigmoid(a r_ti))

Then c tokens that are decoded or verified together read the union of their
experts: each expert that any of them uses is read once, in one product for all.

Primitive: `expert_apply`, in tiles of all tokens where they are few.
Departs: the weight of `sparsity` is constant, where the paper adapts it to the
loss.  Training computes all experts densely, as the released code does: what
ReLU starts from, half of them, costs no less.  A `Setting`, the least s / rms s
of an expert that runs, moves the budget; it is ours.
Axes: B batch, T tokens, D features, F hidden of one expert, E experts.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.covers import MIN_CHUNK, tiles
from adaptivejax.core.router_losses import (
  activation_locality,
  chunk_sparsification,
)
from adaptivejax.nn.block import only
from adaptivejax.nn.experts import (
  apply_all_experts,
  apply_masked_experts,
  expert_signals,
)
from adaptivejax.nn.linear import linear
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.routing import router_logits
from adaptivejax.nn.setting import Setting
from adaptivejax.nn.stacked import stacked


class BlockFFN(nnx.Module):
  """A feed-forward module of ReLU-routed experts; called like `nn.Mlp`.

  Args:
    features, hidden, experts: D, F and E.
    chunk: tokens in a row whose experts are to be few.
    sparsity, locality: weights of the losses.
    sharpness: a, of the sigmoid that stands for "is used".
    rngs: for the parameters.
  """

  def __init__(
    self,
    features: int,
    hidden: int,
    experts: int,
    *,
    chunk: int = 64,
    sparsity: float = 5e-2,
    locality: float = 2e-3,
    sharpness: float = 100.0,
    rngs: nnx.Rngs,
  ):
    if chunk < 1:
      raise ValueError(f"a chunk needs at least 1 token; got {chunk=}.")
    self.gate = linear(features, experts, rngs=rngs)
    self.scale = nnx.Param(jnp.ones(experts))
    make = lambda r: Mlp(features, hidden, activation=jax.nn.silu, rngs=r)
    self.experts = stacked(make, experts, rngs)
    self.level = Setting(jnp.zeros(()))
    self.chunk, self.sharpness = chunk, sharpness
    self.sparsity, self.locality = sparsity, locality

  def route(
    self, logits: Float[Array, "*N E"]
  ) -> tuple[Bool[Array, "*N E"], Float[Array, "*N E"]]:
    """The experts that run, and the weights of all."""
    s = jax.nn.relu(logits)
    s = s * jax.lax.rsqrt((s * s).mean(-1, keepdims=True) + 1e-6)
    return s > self.level.get_value(), s * self.scale.get_value()

  def __call__(
    self,
    x: Float[Array, "*B T D"],
    live: Bool[Array, "*B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Float[Array, "*B T D"], Cost, Signals]:
    x = only(live, x)
    logits = router_logits(self.gate, x)
    active, weights = self.route(logits)
    active = only(live, active)
    if key is None:
      items = x[..., 0].size
      cover = tiles(items) if items <= MIN_CHUNK else None
      y, cost = apply_masked_experts(
        self.experts, x, active, weights, cover=cover
      )
    else:
      weights = jnp.where(active, weights, 0)
      y, cost = apply_all_experts(self.experts, x, weights)
    penalty = 0.0 if key is None else self._penalty(logits, live)
    asked = flops(lambda m, x: m(x), self.gate, x)
    return y, cost.with_overhead(asked), expert_signals(active, penalty)

  def _penalty(self, logits, live) -> Float[Array, ""]:
    sparse = chunk_sparsification(jax.nn.relu(logits), self.chunk, live)
    local = activation_locality(self.sharpness * logits, live)
    return self.sparsity * sparse + self.locality * local
