# SPDX-License-Identifier: Apache-2.0
r"""Adaptive computation time: each token repeats one block until it halts.

Graves, 2016, https://arxiv.org/abs/1603.08983
Dehghani et al., 2018 (Universal Transformer), https://arxiv.org/abs/1807.03819

With s_n the state of a token after step n and h_n = sigmoid(w . s_n + b), it
halts at N = min {n : h_1 + .. + h_n >= 1 - epsilon}, at the latest at the last
step.  With the remainder R = 1 - sum_{n<N} h_n (eqs. 6 to 8), its output is

    y = sum_{n<N} h_n s_n + R s_N,    its ponder cost    rho = N + R,

whose mean is the `penalty` of the signals: weigh it by 1e-3 to 1e-2.  In a
Universal Transformer the step is a transformer block, the same at every step,
told the step by an embedding.  A token that has halted is computed no more; its
last state still serves the others as a key.  The logit of h starts at 1; a
`Setting` is added to it, 0 as trained, more halts earlier.

Primitive: `ponder` in a `depth_loop` over tokens (training: `depth_scan`), each
step `bucketed`.
Departs: pre-norm block; step embeddings are learned and given to tokens that go
on only; attention scores are computed for all tokens while any goes on.
Axes: B batch, T tokens, D features, N steps.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from adaptivejax.core.attention import Keys
from adaptivejax.core.buckets import bucketed
from adaptivejax.core.cost import Cost, Signals, flops, times
from adaptivejax.core.depth import depth_loop, depth_scan, most_of_layers
from adaptivejax.core.halting import Ponder, ponder
from adaptivejax.nn.block import Block, Layer, LayerOutput
from adaptivejax.nn.router import Router
from adaptivejax.nn.setting import Setting


class AdaptiveComputationTime(Layer):
  """A block repeated up to `steps` times, for each token as often as it asks.

  A layer for whole sequences.  Given a `key` (training) all steps run, under
  masks; without, it stops with the last token.
  """

  def __init__(
    self, block: Block, features: int, *, steps=8, epsilon=0.01, rngs: nnx.Rngs
  ):
    if steps < 1 or not 0 <= epsilon < 1:
      raise ValueError(f"{steps=} must be at least 1, {epsilon=} in [0, 1).")
    self.block = block
    self.router = Router(features, rngs=rngs)
    init = jax.nn.initializers.normal(features**-0.5)
    self.times = nnx.Param(init(rngs.params(), (steps, features)))
    self.level = Setting(jnp.zeros(()))
    self.epsilon = epsilon

  def ponder(self, x, positions, live=None, key=None):
    """`(y, N i32[B, T], R f32[B, T], cost)`; N = R = 0 where not `live`."""
    shape, embedded = x.shape, self.times.get_value()
    given = jnp.ones(shape[:2], bool) if live is None else live
    fold = lambda a: a.reshape(-1, *a.shape[2:])  # the tokens are the rows
    start = jnp.where(given[..., None], x, 0)  # whatever stands elsewhere

    def step(time, n, s, state, going):
      going = going.reshape(shape[:2]) & given
      s = jnp.where(going[..., None], s.reshape(shape) + time, s.reshape(shape))
      inner = None if key is None else jax.random.fold_in(key, n)
      s, state = self._step(s, positions, state, going, given, inner)
      return fold(s), state

    def halt(n, before, s, memory):
      del before
      logit = 1 + self.router(s)[..., 0] + self.level.get_value()
      h, last = (
        jax.nn.sigmoid(logit.astype(jnp.float32)),
        n == len(embedded) - 1,
      )
      stop, memory = ponder(h, s, memory, last=last, epsilon=self.epsilon)
      return stop | ~fold(given), memory

    keys = jax.tree.map(
      jnp.zeros_like, self.block.attention.keys(start, positions)
    )
    run = depth_loop if key is None else depth_scan
    state, memory = (keys, given, Cost.zero()), Ponder.start(fold(start))
    out = run(step, embedded, fold(start), state, halt, memory)
    ran = out.depth.max() if key is None else len(embedded)
    cost = out.state[-1]
    asked, steps = flops(self.router, x), len(embedded)
    most = most_of_layers(step, embedded, fold(start), state)
    cost = cost._replace(
      spent=cost.spent + asked * ran,
      full=cost.full * steps / ran,
      bound=jnp.float32(most + times(asked, steps)),
    )
    y = jnp.where(fold(given)[:, None], out.memory.y.astype(x.dtype), fold(x))
    lead = lambda a: jnp.where(given, a.reshape(shape[:2]), 0)
    return y.reshape(shape), lead(out.depth), lead(out.memory.remainder), cost

  def _step(self, s, positions, state, going, given, key):
    """One step of the tokens `going`; halted ones have a key and no query."""
    (k, v), moved, cost = state  # `moved` since their keys were made
    attention, h = self.block.attention, self.block.norm_attention(s)
    on = lambda f, x, mask: bucketed(f, x, mask, attention, keep=False)
    new, made = on(lambda h, a: a.keys(*h), (h, positions), moved)
    q, asked = on(lambda h, a: a.queries(*h), (h, positions), going)
    k, v = (jnp.where(moved[..., None, None], *kv) for kv in zip(new, (k, v)))
    place = jnp.where(given, positions, -1)
    k_major, v_major = (jnp.moveaxis(a, 2, 1) for a in (k, v))
    keys = Keys(k_major, v_major, place[:, None])
    found = attention.look(q, keys, place, x=h, key=key)
    mixed = found.out.reshape(s.shape)
    y, out = on(lambda m, a: a.out(m), mixed, going)
    s, fed, _ = self.block.feed(s + y, going, key)
    return s, ((k, v), going, cost + made + asked + found.cost + out + fed)

  def __call__(
    self, x, positions, cache=None, index=0, live=None, key=None
  ) -> LayerOutput:
    if cache is not None:
      raise ValueError(
        "adaptive computation time takes whole sequences: at each step a token"
        " looks at others as they are then, which a cache does not hold."
      )
    y, steps, remainder, cost = self.ponder(x, positions, live, key)
    count = steps.size if live is None else jnp.maximum(live.sum(), 1)
    rho = (steps + remainder).sum() / count
    share = rho / (self.times.get_value().shape[0] + 1)
    return y, None, cost, Signals(share, rho)
