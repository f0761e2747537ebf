# SPDX-License-Identifier: Apache-2.0
r"""Lightning Attention: a decaying state of fixed size instead of a cache.

Qin et al., 2024, https://arxiv.org/abs/2401.04658

With q, k, v = SiLU of the projections, head h of H in layer l of L (sec. 3.3;
slopes as in TransNormerLLM, https://arxiv.org/abs/2307.14995, eq. 11)

    S_t = lambda S_(t-1) + k_t v_t^T,        o_t = q_t S_t,
    lambda = exp(-2^(-8h/H) (1 - l/(L-1))),
    y = (sigmoid(x W_g) * norm(o)) W_o:

no softmax, time and memory of a token independent of how many came before.  In
training, chunks of tokens: pairs inside, the state between (alg. 1 and 2).

Primitive: `attend_linear`, by Pallas kernels on TPU, in a `Recurrent` look: any
model of `Attention`s takes it; the state is the look's memory in the cache.
Departs: activation, norm and gate are those of MiniMax-01
(https://arxiv.org/abs/2501.08313), and equal its published code to 1e-5; like
there, 1e-5 is added to l's factor and to L - 1.  Tokens that are not live leave
the state as it is.
Axes: B batch, T tokens, D features, H heads.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adaptivejax.nn.linear import linear
from adaptivejax.nn.norm import RMSNorm
from adaptivejax.nn.recurrent import Recurrent


class LightningAttention(Recurrent):
  """A look that remembers a state; the cache keeps one empty slot.

  Args:
    features: D.
    heads: H.
    layers: L, by which the deeper ones forget less; None: all like the first.
    chunk: tokens of a chunk in training and prefill (static).
    rngs: for the gate.
  """

  def __init__(
    self,
    features: int,
    heads: int,
    layers: int | None = None,
    *,
    chunk: int = 64,
    rngs: nnx.Rngs,
  ):
    if heads < 1 or features % heads:
      raise ValueError(f"{heads=} must divide {features=}.")
    if layers is not None and layers < 1:
      raise ValueError(f"{layers=} must be at least 1, or None.")
    super().__init__(heads, chunk=chunk)
    self.features = features
    self.norm = RMSNorm(features)
    self.gate = linear(features, features, rngs=rngs)
    self.layers = layers

  def log_decay(self, layer: Int[Array, ""] | int) -> Float[Array, "1 H 1"]:
    slope = 2.0 ** (-8.0 * jnp.arange(1, self.heads + 1) / self.heads)
    depth = 0.0 if self.layers is None else layer / (self.layers - 1 + 1e-5)
    return -(slope * (1 - depth + 1e-5)).astype(jnp.float32)[None, :, None]

  def before(self, a: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.nn.silu(a)

  def after(
    self, mixed: Float[Array, "B T D"], x: Float[Array, "B T D"]
  ) -> Float[Array, "B T D"]:
    if x.shape[-1] != self.features:
      raise ValueError(
        f"a look of {self.features=} is in an attention of {x.shape[-1]}."
      )
    return jax.nn.sigmoid(self.gate(x)) * self.norm(mixed)
