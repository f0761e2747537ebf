# SPDX-License-Identifier: Apache-2.0
r"""Soft MoE: E experts run P slots each, mixtures of all tokens.

Puigcerver et al., 2023, https://arxiv.org/abs/2308.00951

With unit vectors, and a learned scale a, slot (e, p) and token t match by

    l_tep = a  x_t / |x_t| . mu_ep / |mu_ep|

and a slot is a mean of the tokens, a token one of the slots (eqs. 1-3):

    s_ep = sum_t softmax_t(l)_tep x_t
    y_t  = sum_ep softmax_ep(l)_tep E_e(s_ep)

The work is that of E P rows whatever T is.  Nothing is dropped, nothing needs
balancing, and everything has a gradient.  A slot sees the whole sequence: a
causal model refuses this layer, unless told that it is meant.

Primitive: none; dense products over slots.
Departs: |v| is sqrt(sum v^2 + 1e-6), as in the published code.  The first
`slots` of each expert may be run alone; that is ours.
Axes: B batch, T tokens, D features, E experts, P slots per expert.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.nn.block import only
from adaptivejax.nn.mlp import Mlp


class SoftMoE(nnx.Module):
  """A feed-forward module of mixed tokens; called like `nn.Mlp`.

  Args:
    experts: an `Mlp` whose parameters are stacked over E (`nn.stacked`).
    features: D.
    slots: P (static).
    allow_noncausal: let a causal model use it (static).
    rngs: for the parameters.
  """

  def __init__(
    self,
    experts: Mlp,
    features: int,
    *,
    slots: int = 1,
    allow_noncausal: bool = False,
    rngs: nnx.Rngs,
  ):
    if slots < 1:
      raise ValueError(f"an expert needs at least one slot; got {slots=}.")
    self.experts = experts
    self.count = experts.down.kernel.shape[0]
    shape = (features, self.count, slots)
    init = jax.nn.initializers.normal(features**-0.5)
    self.mu = nnx.Param(init(rngs.params(), shape))
    self.scale = nnx.Param(jnp.ones(()))
    self.slots = slots
    self.looks_ahead = not allow_noncausal

  def match(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T E P"]:
    """l, in f32."""
    mu = self.mu.get_value()[..., : self.slots].astype(jnp.float32)
    scaled = _unit(mu, 0) * self.scale.get_value()
    return jnp.einsum("...td,dep->...tep", _unit(x, -1), scaled)

  def __call__(
    self,
    x: Float[Array, "*B T D"],
    live: Bool[Array, "*B T"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Float[Array, "*B T D"], Cost, Signals]:
    del key
    x = only(live, x)
    y = self.mix(x, live)
    one = jax.tree.map(lambda a: a[0], self.experts)
    full = flops(Mlp.rows, one, x) * self.count
    rows = self.count * self.slots * x[..., 0, 0].size
    spent = flops(lambda m, x: m.mix(x, live), self, x)
    spent = jnp.float32(spent)
    cost = Cost.dense(full, rows)._replace(spent=spent, bound=spent)
    return y, cost, Signals.none()

  def mix(
    self, x: Float[Array, "*B T D"], live: Bool[Array, "*B T"] | None
  ) -> Float[Array, "*B T D"]:
    """The layer itself."""
    match = self.match(x)
    live = jnp.ones(x.shape[:-1], bool) if live is None else live
    there = live[..., None, None]
    gather = jax.nn.softmax(jnp.where(there, match, -1e30), axis=-3)
    spread = jax.nn.softmax(match, axis=(-2, -1))
    gather, spread = (
      jnp.where(there, a, 0).astype(x.dtype) for a in (gather, spread)
    )
    slots = jnp.einsum("...tep,...td->e...pd", gather, x)
    made = jax.vmap(Mlp.rows)(self.experts, slots)
    return jnp.einsum("...tep,e...pd->...td", spread, made)


def _unit(v: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
  """Vectors along `axis` of length 1, or 0 where they are."""
  v = v.astype(jnp.float32)
  return v * jax.lax.rsqrt((v * v).sum(axis, keepdims=True) + 1e-6)
