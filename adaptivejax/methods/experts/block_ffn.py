# SPDX-License-Identifier: Apache-2.0
r"""BlockFFN: a token runs the experts that a ReLU leaves, as many as they are.

Song et al., 2025, https://arxiv.org/abs/2507.08771

    r = W x,   s = relu(r),   A = RMSNorm(s),
    y = sum_{i: s_i > 0} A_i down_i silu(up_i x)                  (sec. 3.1)

The experts are many, narrow and not gated.  Where nothing is cut off, nothing
is approximated: A_i is 0 wherever expert i is left out.  Two losses make the
experts that c tokens in a row use few (sec. 3.2), p = s / sum_i s_i:

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
from adaptivejax.core.dispatch import dispatch_mask
from adaptivejax.core.experts import expert_apply
from adaptivejax.nn.block import only
from adaptivejax.nn.experts import stacked
from adaptivejax.nn.linear import linear
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.routing import router_logits
from adaptivejax.nn.setting import Setting


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
    active = active if live is None else active & live[..., None]
    run = self._sparse if key is None else self._dense
    y, cost = run(x.reshape(-1, x.shape[-1]), _rows(active), _rows(weights))
    asked = flops(lambda m, x: m(x), self.gate, x)
    penalty = jnp.float32(0) if key is None else self._penalty(logits, live)
    used = active.astype(jnp.float32)
    load = (_rows(used).sum(0),)
    signals = Signals(used.mean(), penalty, load, (used.sum(-1),))
    return y.reshape(x.shape), cost._replace(spent=cost.spent + asked), signals

  def _sparse(self, x, active, weights) -> tuple[Array, Cost]:
    cover = tiles(len(x)) if len(x) <= MIN_CHUNK else None
    plan = dispatch_mask(active, weights)
    f = lambda rows, expert: expert.rows(rows)
    return expert_apply(f, x, plan, self.experts, cover=cover)

  def _dense(self, x, active, weights) -> tuple[Array, Cost]:
    def run(experts, x, weights):
      """One wide layer, its neurons scaled in blocks."""
      up, down = experts.up.kernel.get_value(), experts.down.kernel.get_value()
      count, features, hidden = up.shape
      h = x @ jnp.moveaxis(up, 0, 1).reshape(features, count * hidden)
      h = experts.activation(h).reshape(-1, count, hidden)
      h = h * weights[..., None].astype(h.dtype)
      return h.reshape(-1, count * hidden) @ down.reshape(-1, features)

    args = self.experts, x, jnp.where(active, weights, 0)
    return run(*args), Cost.dense(flops(run, *args), active.size)

  def _penalty(self, logits, live) -> Float[Array, ""]:
    scores = only(live, jax.nn.relu(logits))
    sparse = chunk_sparsification(scores, self.chunk, live)
    local = activation_locality(self.sharpness * logits, live)
    return self.sparsity * sparse + self.locality * local


def chunk_sparsification(
  s: Float[Array, "*B T E"],
  chunk: int,
  live: Bool[Array, "*B T"] | None = None,
) -> Float[Array, ""]:
  """Probability that a chunk of tokens in a row uses an expert, mean over both.

  Args:
    s: scores of at least 0; a token uses expert i with probability s_i / sum s,
      and none if all are 0.
    chunk: tokens; those of a sequence need not be a multiple (static).
    live: tokens that count; a chunk without any does not.
  """
  total = s.sum(-1, keepdims=True)
  p = s / jnp.where(total > 0, total, 1)
  chunk = min(chunk, p.shape[-2])
  rest = -p.shape[-2] % chunk
  p = jnp.pad(p, [(0, 0)] * (p.ndim - 2) + [(0, rest), (0, 0)])
  p = p.reshape(-1, chunk, p.shape[-1])
  used = 1 - jnp.prod(1 - p, axis=1).mean(-1)
  live = jnp.ones(s.shape[:-1], bool) if live is None else live
  live = jnp.pad(live, [(0, 0)] * (live.ndim - 1) + [(0, rest)])
  there = live.reshape(-1, chunk).any(1)
  return (used * there).sum() / jnp.maximum(there.sum(), 1)


def activation_locality(
  logits: Float[Array, "*B T E"], live: Bool[Array, "*B T"] | None = None
) -> Float[Array, ""]:
  """Binary cross-entropy of a token's experts given those of the one before.

  Mean over neighbours that are both live; 0 without any.
  """
  before, now = logits[..., :-1, :], logits[..., 1:, :]
  loss = jax.nn.softplus(before) - jax.nn.sigmoid(now) * before
  both = jnp.ones(loss.shape[:-1], bool)
  if live is not None:
    both = live[..., :-1] & live[..., 1:]
  count = jnp.maximum(both.sum() * loss.shape[-1], 1)
  return jnp.where(both[..., None], loss, 0).sum() / count


def _rows(a: Array) -> Array:
  return a.reshape(-1, a.shape[-1])
