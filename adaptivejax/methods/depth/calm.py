# SPDX-License-Identifier: Apache-2.0
r"""CALM: a token leaves the layers once the model is sure of the next token.

Schuster et al., 2022, https://arxiv.org/abs/2207.07061

With p_l = softmax(readout(h_l)) after layer l, the exit layer is (sec. 3)

    exit = min { l >= min_depth : max_v p_l(v) >= lambda },   else L,

and the skipped layers' keys and values are projected from the exit state
(sec. 3.1), so that later tokens may go deeper.  The prompt runs all layers.

Primitive: `depth_loop` on `max_prob`, then `kv_propagate`.
Departs: a row that is sure waits, frozen, until its batch is (exits stay per
row; the published code lets the least confident row decide for all), and the
state that is propagated is the exit state, as in the paper (the published code
propagates that of the first exit).  Confidence is the largest probability, a
choice of the published code; the paper takes the difference of the two largest.
One threshold for all positions, set by a budget (`exit_confidence`), not by the
paper's learn-then-test guarantee.
Axes: L layers, B batch, T tokens, D features, V vocabulary, N samples.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adaptivejax.core.cache import kv_propagate
from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.depth import depth_loop
from adaptivejax.core.halting import max_prob
from adaptivejax.nn.block import Block
from adaptivejax.nn.stack import StackOutput, layer_at, layer_count, plain


def calm(
  layers,
  x: Float[Array, "B T D"],
  positions,
  cache=None,
  *,
  readout,
  key=None,
  threshold: Float[Array, ""] | float,
  min_depth=1,
) -> StackOutput:
  """A stack that stops at the first confident layer, when decoding (T = 1).

  Args:
    threshold: lambda; above 1 never exits, 0 exits at `min_depth` (dynamic).
    min_depth: layers that every token runs (dynamic).

  Other arguments as in `nn.stack`.  Training has no exits: see `sorted_loss`.
  """
  if not isinstance(layers, Block):
    raise ValueError(
      f"calm exits between layers of type `Block`, whose keys it can fill in;"
      f" this model stacks {type(layers).__name__}. Decode it with `plain`."
    )
  if cache is None or x.shape[1] > 1:
    return plain(layers, x, positions, cache, readout=readout, key=key)
  total = layer_count(layers)

  def layer(block, l, x, state, live):
    # rows that wait run too: that writes the keys of their exit state
    cache, cost = state
    x, cache, spent, _ = block(x, positions, cache, l)
    asked = spent.items * live.mean(dtype=jnp.float32)
    return x, (cache, cost + spent._replace(items=asked))

  def sure(l, before, after, memory):
    del l, before
    return max_prob(readout(after[:, 0])) >= threshold, memory

  out = depth_loop(
    layer, layers, x, (cache, Cost.zero()), sure, min_depth=min_depth
  )
  cache, cost = out.state
  ran = out.depth.max()
  start = jnp.broadcast_to(ran, out.depth.shape)

  def project(l, cache):
    del cache
    return layer_at(layers, l).project_keys(out.x, positions)

  cache = kv_propagate(cache, start, project)
  check = flops(readout, x) * ran
  fill = flops(
    lambda b, x: b.project_keys(x, positions), layer_at(layers, 0), x
  )
  cost = cost._replace(
    spent=cost.spent + check + fill * (total - ran),
    full=cost.full * total / ran,
  )
  depth = out.depth[:, None].astype(jnp.float32)
  shares = (jnp.arange(total) < ran).astype(jnp.float32)
  return StackOutput(out.x, cache, cost, Signals.none(), depth, shares)


def exit_confidence(
  hidden: Float[Array, "L B T D"], readout
) -> Float[Array, "N L"]:
  """Confidence of every token after every layer, to calibrate thresholds on.

  Give it the hidden states of `every_layer`; feed the result to
  `core.budget.solve_depth_threshold`.
  """
  sure = jax.lax.map(lambda h: max_prob(readout(h)), hidden)
  return sure.reshape(hidden.shape[0], -1).T
