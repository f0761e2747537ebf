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

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.clusters import balanced_clusters
from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.dispatch import NOBODY, check_count, dispatch_mask
from adaptivejax.core.experts import expert_apply
from adaptivejax.core.losses import load_balance
from adaptivejax.core.select import top_k
from adaptivejax.nn.block import only
from adaptivejax.nn.mlp import Mlp, split_mlp
from adaptivejax.nn.router import Router
from adaptivejax.nn.setting import Frozen, Setting

MOST_SUBSETS = 1000


class FactorLLM(nnx.Module):
  """A feed-forward module made of a trained one; called like `nn.Mlp`.

  Args:
    mlp: the trained layer.
    experts: E, which divides its hidden neurons.
    top_k: K.
    order: of the neurons, those of an expert in a row; as they stand, if not
      given.  See `clusters`.
    prior, balance: weights of the losses; with `prior` 0 no teacher is kept,
      and training computes what was chosen only.
    rngs: for the router.

  Raises:
    ValueError: no such split or choice, or more subsets than can be tried.
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
    if prior and math.comb(experts, top_k) > MOST_SUBSETS:
      raise ValueError(
        f"{top_k} of {experts} experts can be chosen in more than"
        f" {MOST_SUBSETS} ways, too many to find the best: pass `prior=0`."
      )
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
    chosen = self.choose(logits)
    chosen = chosen if live is None else chosen & live[..., None]
    mask, flat = chosen.reshape(-1, self.count), x.reshape(-1, x.shape[-1])
    scale = self.count / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    gate = jnp.where(mask, scale, 0).astype(x.dtype)
    penalty = jnp.float32(0)
    if key is None or self.teacher is None:
      plan = dispatch_mask(mask, gate)
      y, cost = expert_apply(lambda r, m: m.rows(r), flat, plan, self.experts)
    else:
      y, cost, best = self._teach(self.teacher, flat, gate)
      penalty = self.prior * _distance(logits, best.reshape(chosen.shape), live)
    if key is not None:
      listed = jnp.where(chosen, jnp.arange(self.count), NOBODY)
      p = jax.nn.softmax(logits)
      penalty += self.balance * load_balance(p, listed, live)
    asked = flops(lambda m, x: m(x), self.router, x)
    used = chosen.astype(jnp.float32)
    load = (used.reshape(-1, self.count).sum(0),)
    signals = Signals(used.mean(), penalty, load, (used.sum(-1),))
    return y.reshape(x.shape), cost._replace(spent=cost.spent + asked), signals

  def _teach(self, teacher, x, gate) -> tuple[Array, Cost, Bool[Array, "N E"]]:
    """All experts, weighted; what they and the teacher cost; the best K."""
    run = jax.vmap(Mlp.rows, in_axes=(0, None))
    parts, wanted = run(self.experts, x), teacher.rows(x)
    y = jnp.einsum("end,ne->nd", parts, gate)
    experts = flops(run, self.experts, x)
    cost = Cost.dense(experts, gate.size)
    taught = flops(Mlp.rows, teacher, x)
    cost = cost._replace(spent=cost.spent + taught)
    best = best_subset(*jax.lax.stop_gradient((parts, wanted)), self.top_k)
    return y, cost, best


def best_subset(
  parts: Float[Array, "E N D"], wanted: Float[Array, "N D"], k: int
) -> Bool[Array, "N E"]:
  """The `k` parts whose sum is nearest to `wanted`.

  All subsets are tried, by |f - sum p|^2 = |f|^2 - 2 sum f.p + sum p.p; at ties
  the first in lexicographic order wins.
  """
  parts, wanted = parts.astype(jnp.float32), wanted.astype(jnp.float32)
  count = len(parts)
  chosen = np.zeros((math.comb(count, k), count), np.float32)
  for row, subset in zip(chosen, itertools.combinations(range(count), k)):
    row[list(subset)] = 1
  along = jnp.einsum("end,nd,se->ns", parts, wanted, chosen)
  gram = jnp.einsum("end,fnd->nef", parts, parts)
  size = jnp.einsum("se,nef,sf->ns", chosen, gram, chosen)
  return jnp.asarray(chosen > 0)[(size - 2 * along).argmin(-1)]


def clusters(mlp: Mlp, experts: int, *, seed: int = 0) -> Int[np.ndarray, " F"]:
  """An order of the neurons in which those of an expert are alike.

  Alike is in the direction of their input weights (`core.clusters`, host).
  """
  layer = mlp.up if mlp.gate is None else mlp.gate
  points = np.asarray(layer.kernel.get_value(), np.float32).T
  points = points / np.maximum(np.linalg.norm(points, axis=1)[:, None], 1e-12)
  expert = balanced_clusters(points, experts, seed=seed)
  return np.argsort(expert, kind="stable").astype(np.int32)


def frozen(mlp: Mlp) -> Mlp:
  """A copy whose weights are no parameters."""
  mlp = jax.tree.map(jnp.copy, mlp)
  for layer in (mlp.up, mlp.gate, mlp.down):
    if layer is not None:
      weight = Frozen(layer.kernel.get_value())
      layer.kernel = weight  # pyrefly: ignore[bad-assignment]
  return mlp


def _distance(logits, best, live) -> Float[Array, ""]:
  """KL(softmax(logits) | softmax(1_best)), mean over live items."""
  log_p = jax.nn.log_softmax(logits)
  log_q = jax.nn.log_softmax(best.astype(jnp.float32))
  each = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
  live = jnp.ones(each.shape, bool) if live is None else live
  return jnp.where(live, each, 0).sum() / jnp.maximum(live.sum(), 1)
