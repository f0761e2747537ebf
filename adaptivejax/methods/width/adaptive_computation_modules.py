# SPDX-License-Identifier: Apache-2.0
r"""Adaptive Computation Modules: a token uses the first k of M small learners.

Wojcik et al., 2023, https://arxiv.org/abs/2312.10193

A layer is replaced by M learners of width F / M; with k of them its output is

    y = sum_{i <= k} learner_i(x),   k in 0..M,   k = argmax gate(x).

In training k is a straight-through Gumbel-softmax sample, so that the task loss
reaches the gate; to it come a budget loss on the mean share of learners (see
`core.budget.budget_loss`) and two terms that keep the gate diverse: the
normalised entropy of its use within a sequence and the mean difference in load
between sequences (both maximised).  Afterwards a `Setting` moves the budget
without training: gate_k - tilt k is maximised instead.

Primitive: `level_apply`.
Departs: the published inference runs one learner fewer for tokens at the batch
maximum, and no task gradient reaches its gates; both are mended here.  Only
feed-forward layers are replaced, trained end to end (phase 3): no distillation
of the learners (phase 1), no labels for the gate (phase 2).  `tilt` is ours.
Axes: B batch, T tokens, D features, F hidden, M learners.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.levels import level_apply
from adaptivejax.core.select import gumbel_softmax
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.router import Router
from adaptivejax.nn.setting import Setting


class AdaptiveComputationModule(nnx.Module):
  """A feed-forward module of nested learners; called like `nn.Mlp`.

  Args:
    learners: an `Mlp` whose parameters are stacked over M, see `nn.split_mlp`.
    features: D.
    temperature: of the Gumbel-softmax.
    diversity: weight of both diversity terms.
    rngs: for the gate, which starts at nearly all learners.
  """

  def __init__(
    self,
    learners: Mlp,
    features: int,
    *,
    temperature: float = 0.8,
    diversity: float = 0.05,
    rngs: nnx.Rngs,
  ):
    self.learners = learners
    self.count = learners.down.kernel.shape[0]
    self.gate = Router(features, self.count + 1, hidden=16, rngs=rngs)
    # Concave: a tax of 0 to 6 takes one learner after the other.
    without = 1 - jnp.arange(self.count + 1) / self.count
    self.gate.outer.bias = nnx.Param(3.0 * self.count * (1 - without**2))
    self.tilt = Setting(jnp.zeros(()))
    self.temperature = temperature
    self.diversity = diversity

  def level(self, x: Float[Array, "*N D"]) -> Int[Array, "*N"]:
    """Learners that each item uses, 0..M; `tilt` taxes each learner."""
    tax = self.tilt.get_value() * jnp.arange(self.count + 1)
    return self.gate.choose(x, tax)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    live: Bool[Array, "B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Float[Array, "B T D"], Cost, Signals]:
    if live is not None:
      x = jnp.where(live[..., None], x, 0)
    if key is None:
      y, cost, signals = self._infer(x, live)
    else:
      y, cost, signals = self._train(x, live, key)
    gate = flops(lambda g, x: g(x), self.gate, x)
    return y, cost.with_overhead(gate), signals

  def _infer(self, x, live) -> tuple[Array, Cost, Signals]:
    level = self.level(x)
    level = level if live is None else jnp.where(live, level, 0)
    y, cost = level_apply(lambda r, m: m.rows(r), x, level, self.learners)
    share = jnp.mean(level, dtype=jnp.float32) / self.count
    return y, cost, Signals(share, jnp.float32(0))

  def _train(self, x, live, key) -> tuple[Array, Cost, Signals]:
    logits = self.gate(x).astype(jnp.float32)
    choice = gumbel_softmax(logits, key, self.temperature)
    uses = 1 - jnp.cumsum(choice, axis=-1)[..., :-1]  # learner i: k > i
    if live is not None:
      uses = jnp.where(live[..., None], uses, 0)
    parts = jax.vmap(Mlp.rows, in_axes=(0, None))(self.learners, x)
    y = jnp.einsum("mbtd,btm->btd", parts, uses.astype(x.dtype))
    dense = flops(jax.vmap(Mlp.rows, in_axes=(0, None)), self.learners, x)
    penalty = self.diversity * _sameness(jax.nn.softmax(logits))
    return y, Cost.dense(dense, x[..., 0].size), Signals(uses.mean(), penalty)


def _sameness(use: Float[Array, "B T M1"]) -> Float[Array, ""]:
  """Low where the gate uses all choices, and sequences differ in load."""
  mean = use.mean(1)
  choices = use.shape[-1]
  entropy = -(mean * jnp.log(mean + 1e-9)).sum(-1) / jnp.log(choices)
  load = (mean * jnp.arange(choices) / (choices - 1)).sum(-1)
  spread = jnp.abs(load[:, None] - load[None]).mean()
  return -entropy.mean() - spread
