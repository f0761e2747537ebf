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

Primitive: `attend_linear`, by Pallas kernels on TPU.  It is a look, so any
model of `Attention`s takes it; the state is the look's memory in the cache.
Departs: activation, norm and gate are those of MiniMax-01
(https://arxiv.org/abs/2501.08313), and equal its published code to 1e-5; like
there, 1e-5 is added to l's factor and to L - 1.  Tokens that are not live leave
the state as it is.
Axes: B batch, T tokens, D features, H query heads, W head width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import Cost, flops
from adaptivejax.core.linear_attention import attend_linear
from adaptivejax.nn.linear import linear
from adaptivejax.nn.look import Look, Looked
from adaptivejax.nn.norm import RMSNorm


class LightningAttention(Look):
  """A look that remembers a state; the cache keeps one empty slot.

  Args:
    features: D.
    heads: H.
    layers: L, by which the deeper ones forget less; None: all like the first.
    chunk: tokens of a chunk in training and prefill (static).
    rngs: for the gate.
  """

  rotated = False
  evicts = True

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
    self.norm = RMSNorm(features)
    self.gate = linear(features, features, rngs=rngs)
    self.heads, self.layers, self.chunk = heads, layers, chunk

  def log_decay(self, layer: Int[Array, ""] | int) -> Float[Array, "1 H 1"]:
    """Of each head, at a layer (dynamic)."""
    slope = 2.0 ** (-8.0 * jnp.arange(1, self.heads + 1) / self.heads)
    depth = 0.0 if self.layers is None else layer / (self.layers - 1 + 1e-5)
    return -(slope * (1 - depth + 1e-5)).astype(jnp.float32)[None, :, None]

  def slots(self, slots: int) -> int:
    return 1

  def memory(self, batch, heads, slots, width, dtype):
    return jnp.zeros((batch, self.heads, width, width), jnp.float32)

  def __call__(
    self, q, keys, positions, layer=0, *, x=None, live=None, mask=None, key=None
  ) -> Looked:
    _refuse(mask)
    return self._look(q, keys, positions, layer, x, live, None)[0]

  def step(
    self, q, keys, positions, cache: KVCache, layer=0, *, x=None, live=None,
    key=None,
  ) -> tuple[Looked, KVCache]:  # fmt: skip
    _refuse(cache.tree)
    state = cache.recollect(layer)
    looked, state = self._look(q, keys, positions, layer, x, live, state)
    return looked, cache.remember(layer, state)

  def _look(
    self,
    q: Float[Array, "B T H W"],
    keys: Keys,
    positions,
    layer,
    x,
    live,
    state,
  ) -> tuple[Looked, Float[Array, "B H W W"]]:
    if x is None or q.shape[2] != self.heads:
      raise ValueError(
        f"a look of {self.heads=} needs queries of as many heads, and `x`; got"
        f" {q.shape[2]} heads and x={None if x is None else x.shape}."
      )
    x = jnp.where(positions[..., None] >= 0, x, 0)
    q, k, v = map(jax.nn.silu, (q, keys.k, keys.v))
    mixed, state = attend_linear(
      q,
      keys._replace(k=k, v=v),
      self.log_decay(layer),
      state,
      chunk=self.chunk,
      everyone=state is None and live is None,
    )
    gate = nnx.sigmoid(self.gate(x))
    out = (gate * self.norm(mixed.reshape(x.shape))).reshape(q.shape)
    return Looked(out, self._cost(q, x, live)), state

  def _cost(self, q, x, live) -> Cost:
    """Pairs of a chunk and the state, for all tokens: its own dense twin."""
    pairs = 0 if q.shape[1] == 1 else min(self.chunk, q.shape[1])
    work = 4.0 * q.size * (pairs + q.shape[3]) + flops(self.gate, x)
    items = q.shape[0] * q.shape[1]
    cost = Cost.dense(work, items)
    return cost if live is None else cost._replace(items=live.sum() + 0.0)


def _refuse(mask) -> None:
  if mask is not None:
    raise ValueError(
      "LightningAttention has no scores for a mask or a tree of drafts to hide:"
      " its state is that of one text. Decode without drafts; mark tokens that"
      " are not there with position -1."
    )
