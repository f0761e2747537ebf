# SPDX-License-Identifier: Apache-2.0
r"""Duo-LLM: a token takes a small feed-forward layer, the big one, or neither.

Alizadeh et al., 2024, https://arxiv.org/abs/2410.10846

Each feed-forward layer has a small companion, and each token one of three ways,
c in {0 skip, 1 small, 2 big}; attention always runs.  Stage 1 draws c randomly.
Then the oracle asks for the best pattern of c over the layers,

    loss(b) = min { loss(pattern) : at most b layers are big },

token by token, to measure routers against, which stage 3 learns by straight-
through samples and a budget loss on the price of c (0, F_small / F_big, 1).
Afterwards a `Setting` moves the budget: router_c - tilt price_c is maximised.

Primitive: `bucketed` twice, on disjoint masks.
Departs: in the oracle all tokens of a text take a pattern, one pass for each,
and the best is picked per token afterwards; that stage 1 draws the three ways
evenly is ours; so is `tilt`.
Axes: P patterns, L layers, B batch, T tokens, S T + 1, D features.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.buckets import bucketed
from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.losses import cross_entropy
from adaptivejax.core.select import gumbel_softmax
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.router import Router
from adaptivejax.nn.setting import Setting, adjust


class DuoMlp(nnx.Module):
  """A feed-forward module of two sizes; called like `nn.Mlp`.

  Args:
    small, big: the two; `big` is the dense twin.
    features: D.
    random: training draws c, evenly (stage 1), and routers learn nothing.
    rngs: for the router, which starts out in favour of big.
  """

  def __init__(
    self,
    small: Mlp,
    big: Mlp,
    features: int,
    *,
    random: bool = False,
    rngs: nnx.Rngs,
  ):
    self.small, self.big, self.random = small, big, random
    self.router = Router(features, 3, rngs=rngs)
    self.router.outer.bias = nnx.Param(jnp.array([0.0, 0.0, 2.0]))
    self.tilt = Setting(jnp.zeros(()))
    widths = [m.down.kernel.shape[0] for m in (small, big)]
    self.price = (0.0, widths[0] / widths[1], 1.0)

  def choose(self, x: Float[Array, "*N D"]) -> Int[Array, "*N"]:
    """The way of each item: 0, 1 or 2."""
    tax = self.tilt.get_value() * jnp.array(self.price)
    return self.router.choose(x, tax)

  def run(self, x, choice: Int[Array, "*N"]) -> tuple[Array, Cost]:
    """Each item by its way; zero for those that skip."""
    rows = lambda r, m: m.rows(r)
    small, less = bucketed(rows, x, choice == 1, self.small, keep=False)
    big, cost = bucketed(rows, x, choice == 2, self.big, keep=False)
    cost = cost + less._replace(full=jnp.zeros_like(less.full))
    return jnp.where((choice == 1)[..., None], small, big), cost

  def __call__(
    self,
    x: Float[Array, "*N D"],
    live: Bool[Array, "*N"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Float[Array, "*N D"], Cost, Signals]:
    live = jnp.ones(x.shape[:-1], bool) if live is None else live
    x = jnp.where(live[..., None], x, 0)
    asked = flops(lambda r, x: r(x), self.router, x)
    if key is None:
      choice = self.choose(x)
    elif self.random:
      choice, asked = jax.random.randint(key, live.shape, 0, 3), 0.0
    else:
      return self._train(x, live, key)
    choice = jnp.where(live, choice, 0)
    y, cost = self.run(x, choice)
    share = jnp.array(self.price)[choice].mean()
    cost = cost.with_overhead(asked)
    return y, cost, Signals(share, jnp.float32(0))

  def _train(self, x, live, key) -> tuple[Array, Cost, Signals]:
    uses = gumbel_softmax(self.router(x).astype(jnp.float32), key)
    uses = jnp.where(live[..., None], uses, 0)
    w = uses.astype(x.dtype)
    y = w[..., 1:2] * self.small.rows(x) + w[..., 2:] * self.big.rows(x)
    all_of = lambda m, x: (m.small.rows(x), m.big.rows(x), m.router(x))
    cost = Cost.dense(flops(all_of, self, x), live.size)
    full = flops(lambda m, x: m.big.rows(x), self, x)
    share = (uses * jnp.array(self.price)).sum(-1).mean()
    signals = Signals(share, jnp.float32(0))
    return y, cost._replace(full=jnp.float32(full)), signals


def follow(model, pattern: Int[Array, " L"]):
  """The model, all tokens taking `pattern` (dynamic): its routers are blind."""
  model = jax.tree.map(lambda a: a, adjust(model, 0.0))  # a copy
  blind = model.layers.mlp.router.outer
  blind.kernel.set_value(jnp.zeros_like(blind.kernel.get_value()))
  blind.bias.set_value(jax.nn.one_hot(pattern, 3))
  return model


def patterns(layers: int, ways: tuple[int, ...] = (0, 1, 2)) -> Array:
  """All patterns of `ways` over the layers, i32[P, L]; both are static."""
  return jnp.array([*itertools.product(ways, repeat=layers)], jnp.int32)


def pattern_losses(
  model, tokens: Int[Array, "B S"], patterns: Int[Array, "P L"]
) -> Float[Array, "P B T"]:
  """The loss of every next token under each pattern, in nats."""

  def one(pattern):
    logits = follow(model, pattern)(tokens[:, :-1]).logits
    return cross_entropy(logits, tokens[:, 1:])

  return lax.map(one, patterns)


def oracle(
  losses: Float[Array, "P B T"],
  patterns: Int[Array, "P L"],
  budget: Int[Array, ""] | int,
) -> Float[Array, "B T"]:
  """The least loss of each token with at most `budget` (dynamic) big layers."""
  allowed = (patterns == 2).sum(1) <= budget
  return jnp.where(allowed[:, None, None], losses, jnp.inf).min(0)
