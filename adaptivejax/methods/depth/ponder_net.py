# SPDX-License-Identifier: Apache-2.0
r"""PonderNet: the exit is a random variable, trained towards a prior.

Banino et al., 2021, https://arxiv.org/abs/2107.05407
Balagansky and Gavrilov, 2022 (PALBERT), https://arxiv.org/abs/2204.03276

Each exit i has a probability lambda_i to stop there if still there, so that

    p_i = lambda_i prod_{j<i} (1 - lambda_j),     the last takes the remainder,
    loss = sum_i p_i L_i + beta KL(p || p_G),

with p_G a geometric distribution of rate lambda_p, truncated likewise.  To
answer, PonderNet draws the exit from p; PALBERT's Q-exit is deterministic,

    exit = min { i : p_1 + .. + p_i > q },    q = 0.5,

which is the same draw with q in place of a uniform number: `q_exit` does both.
PALBERT also lets lambda see the pooled state of the layer before.

Primitive: `exit_distribution` in training, `cdf` in a `depth_loop`.
Departs: a published code computes KL(p_G || p) in place of the paper's
KL(p || p_G); `direction` gives either.
Axes: K exits, B batch, D features, H hidden.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from adaptivejax.core.halting import cdf, exit_distribution
from adaptivejax.nn.linear import linear


class Lambda(nnx.Module):
  """Three linear maps, tanh between, of a pooled state and the one before."""

  def __init__(self, features: int, hidden: int = 64, *, rngs: nnx.Rngs):
    self.inner = linear(2 * features, hidden, rngs=rngs, bias=True)
    self.middle = linear(hidden, hidden, rngs=rngs, bias=True)
    self.outer = linear(hidden, 1, rngs=rngs, bias=True)

  def __call__(
    self, pooled: Float[Array, "... D"], before: Float[Array, "... D"]
  ) -> Float[Array, "..."]:
    """The lambda of an exit, in 0..1, f32."""
    x = jnp.tanh(self.inner(jnp.concatenate([pooled, before], -1)))
    logit = self.outer(jnp.tanh(self.middle(x)))[..., 0]
    return jax.nn.sigmoid(logit.astype(jnp.float32))


def exit_probabilities(
  head: Lambda, pooled: Float[Array, "K B D"]
) -> Float[Array, "K B"]:
  """The p of every exit; before the first layer the state counts as zero."""
  before = jnp.concatenate([jnp.zeros_like(pooled[:1]), pooled[:-1]])
  return exit_distribution(head(pooled, before))


def geometric_prior(rate: Array | float, exits: int) -> Float[Array, " K"]:
  """p_G of rate lambda_p in 0..1 (dynamic); the last takes the remainder."""
  return exit_distribution(jnp.full(exits, rate, jnp.float32))


def ponder_loss(
  losses: Float[Array, "K B"],
  p: Float[Array, "K B"],
  prior: Float[Array, " K"],
  beta: Array | float = 0.01,
  *,
  direction: Literal["p||prior", "prior||p"] = "p||prior",
) -> Float[Array, ""]:
  """The expected loss and `beta` times the divergence from the prior, in nats.

  Args:
    losses: L_i of each row at each exit.
    p: from `exit_probabilities`.
    prior: from `geometric_prior`.
    direction: of the divergence (static).
  """
  if direction not in ("p||prior", "prior||p"):
    raise ValueError(f'{direction=} must be "p||prior" or "prior||p".')
  a, b = p, jnp.broadcast_to(prior[:, None], p.shape)
  if direction == "prior||p":
    a, b = b, a
  log = lambda x: jnp.log(jnp.maximum(x, 1e-12))  # 0 log 0 = 0, finite slopes
  divergence = (a * (log(a) - log(b))).sum(0).mean()
  return (p * losses).sum(0).mean() + beta * divergence


class Pondering(NamedTuple):
  """What `q_exit` remembers of each row."""

  before: Float[Array, "B D"]  # the pooled state of the layer before
  survived: Float[Array, " B"]  # probability to be still there

  @classmethod
  def start(cls, rows: int, features: int, dtype=jnp.float32) -> "Pondering":
    return cls(jnp.zeros((rows, features), dtype), jnp.ones(rows))


def q_exit(
  l, logits, pooled, memory: Pondering, *, head: Lambda, q: Array | float
) -> tuple[Bool[Array, " B"], Pondering]:
  """The rule of a `Classifier`: leave once the exits so far hold more than `q`.

  Args:
    q: 0 leaves at the first exit, 1 at the last (dynamic).  One uniform number
      per row, f32[B], draws the exit from p: the rule of PonderNet.
  """
  del l, logits
  total, survived = cdf(head(pooled, memory.before), memory.survived)
  return total > q, Pondering(pooled, survived)
