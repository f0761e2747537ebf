# SPDX-License-Identifier: Apache-2.0
r"""Switch Transformer: a token runs the one of E experts that it scores best.

Fedus, Zoph, Shazeer, 2021, https://arxiv.org/abs/2101.03961

    p = softmax(W x),   y = p_i E_i(x),   i = argmax p             (eqs. 1-2)

Each expert takes ceil(capacity_factor T / E) tokens of a sequence (eq. 3), the
earlier ones first; a token that finds no room gets zero and goes by the
residual.  To the loss comes alpha E sum_i f_i P_i (eq. 4), f_i the share of
tokens that want expert i and P_i its mean probability, alpha = 0.01, and 0.001
times the z-loss of Zoph et al., 2022.  In training the router's input is
multiplied by noise in [1 - jitter, 1 + jitter].

Primitive: `within_capacity`, `expert_apply`.
Departs: a capacity is per sequence, so that no token depends on other rows; it
holds in training only, where T is that of the text: else decoding would not say
what a prompt says (the paper evaluates with factor 2).  Then a `Setting`, the
share of the tokens that an expert must refuse, moves the budget, call by call:
for scoring texts, not for decoding token by token.  f_i, P_i are those of all
sequences together.
Axes: B batch, T tokens, D features, E experts.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from adaptivejax.core.dispatch import check_count
from adaptivejax.core.router_losses import load_balance, router_z
from adaptivejax.core.select import best
from adaptivejax.nn.linear import linear
from adaptivejax.nn.routing import Routing, router_logits, serve
from adaptivejax.nn.setting import Setting


class SwitchRouter(nnx.Module):
  """Top-1 routing, a router of `nn.MixtureOfExperts`.

  Args:
    features: D.
    experts: E.
    capacity_factor: room of all experts in training, per token (static).
    jitter: half width of the noise.
    balance: alpha, weight of the balance loss.
    z: weight of the z-loss.
    rngs: for the parameters.
  """

  def __init__(
    self,
    features: int,
    experts: int,
    *,
    capacity_factor: float = 1.25,
    jitter: float = 0.01,
    balance: float = 0.01,
    z: float = 0.001,
    rngs: nnx.Rngs,
  ):
    check_count(experts, 1)
    if not capacity_factor > 0:
      raise ValueError(
        f"{capacity_factor=} must be above 0: experts without room compute"
        " nothing. 1.25 leaves a quarter to spare, E drops nothing."
      )
    if not 0 <= jitter < 1:
      raise ValueError(f"{jitter=} must lie in [0, 1): noise is 1 +- jitter.")
    self.gate = linear(features, experts, rngs=rngs)
    self.refused = Setting(jnp.zeros(()))
    self.count = experts
    self.capacity_factor = capacity_factor
    self.jitter = jitter
    self.balance = balance
    self.z = z

  def capacity(self, tokens: int, training: bool) -> Array | int:
    """Tokens of a sequence that each expert takes."""
    if training:  # .07 * 100 is above 7
      return math.ceil(self.capacity_factor * tokens / self.count - 1e-9)
    room = tokens * (1 - self.refused.get_value())
    return jnp.clip(jnp.round(room), 0, tokens).astype(jnp.int32)

  def __call__(
    self,
    x: Float[Array, "*B T D"],
    live: Bool[Array, "*B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> Routing:
    if key is not None:
      low, high = 1 - self.jitter, 1 + self.jitter
      noise = jax.random.uniform(key, x.shape, minval=low, maxval=high)
      x = x * noise.astype(x.dtype)
    logits = router_logits(self.gate, x)
    p = jax.nn.softmax(logits)
    wanted = best(p, 1)
    room = self.capacity(x.shape[-2], key is not None)
    experts, dropped = serve(wanted, live, self.count, room)
    penalty = self.balance * load_balance(p, wanted, live)
    penalty += self.z * router_z(logits, live)
    return Routing.of(p, experts, live, penalty=penalty, dropped=dropped)
