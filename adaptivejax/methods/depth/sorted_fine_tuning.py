# SPDX-License-Identifier: Apache-2.0
r"""Sorted fine-tuning: every prefix of the layers is a language model.

Valipour et al., 2023 (SortedNet / SoFT), https://arxiv.org/abs/2309.00255
Kavehzadeh et al., 2023, https://arxiv.org/abs/2309.08968

With f_{1:n} the first n layers and the shared norm and readout, the loss is the
weighted mean over the sub-models n in S,

    loss = sum_{n in S} w_n CE(readout(f_{1:n}(x)), y) / sum_{n in S} w_n.

No new parameters; w_n = 1 is the paper's, w_n = n the weights of CALM (2022).
`prefix` then decodes with f_{1:n}: n is data.

Departs: a weighted mean, where the paper sums.
Primitive: `nn.every_layer` (one forward pass), then one readout at a time;
`depth_loop` that stops after n layers.
Axes: L layers, B batch, T tokens, D features, V vocabulary, S sub-models.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptivejax.core.cost import Cost, Signals
from adaptivejax.core.depth import depth_loop, most_of_layers
from adaptivejax.core.losses import exit_cross_entropy
from adaptivejax.nn.setting import refuse_outside
from adaptivejax.nn.stack import StackOutput, checked_by, layer_count


def sorted_loss(
  hidden: Float[Array, "L B T D"],
  readout,
  targets: Int[Array, "B T"],
  *,
  exits: tuple[int, ...] | None = None,
  weights: tuple[float, ...] | None = None,
) -> Float[Array, ""]:
  """Weighted mean cross-entropy over sub-models, in nats per token.

  Args:
    hidden: after every layer, from `nn.every_layer`.
    readout: hidden state to logits.
    targets: the next tokens.
    exits: depths n of the sub-models, 1..L; all if not given (static).
    weights: w_n, one per exit; 1 if not given (static).
  """
  total = hidden.shape[0]
  exits = tuple(range(1, total + 1)) if exits is None else exits
  weights = (1.0,) * len(exits) if weights is None else weights
  if not exits or not all(1 <= n <= total for n in exits):
    raise ValueError(f"{exits=} must be one or more depths in 1..{total}.")
  if len(weights) != len(exits) or min(weights) < 0 or sum(weights) <= 0:
    raise ValueError(
      f"{weights=} must be one per exit, {len(exits)}, none below 0 and not all"
      " of them 0."
    )

  w = jnp.asarray(weights, jnp.float32)
  left = jnp.stack([hidden[n - 1] for n in exits])
  return exit_cross_entropy(left, readout, targets, w)


def _check(total, *, depth=1, **settings):
  del settings
  refuse_outside(1, total, "the layers there are", depth=depth)


@checked_by(_check)
def prefix(
  layers,
  x: Float[Array, "B T D"],
  positions: Int[Array, "B T"],
  cache=None,
  *,
  readout,
  key=None,
  depth: Int[Array, ""] | int,
) -> StackOutput:
  """A stack of the first `depth` layers: a sub-model, for prompts too.

  The layers above are not run and get no keys: nobody asks them.

  Args:
    depth: n, 1..L, as in `exits` (dynamic; beyond the range, the nearest end).

  Other arguments as in `nn.stack`; `key` must be None: a loop whose length is
  data has no gradient.
  """
  del readout
  total = layer_count(layers)
  if key is not None:
    raise ValueError("prefix decodes; to train sub-models take `sorted_loss`.")

  def layer(block, l, x, state, live):
    del live  # all tokens are of one depth
    cache, cost, sums = state
    x, cache, spent, signals = block(x, positions, cache, l * layers.depth)
    sums = jax.tree.map(jnp.add, sums, signals)
    return x, (cache, cost + spent, sums)

  def stop(l, before, after, memory):
    del before, memory
    return jnp.full(after.shape[0], l + 1 >= depth), None

  nothing = jax.tree.map(jnp.zeros_like, Signals.none())
  state = cache, Cost.zero(), nothing
  out = depth_loop(layer, layers, x, state, stop)
  cache, cost, sums = out.state
  ran = out.depth.max()
  signals = jax.tree.map(lambda a: a / ran, sums)
  most = jnp.float32(most_of_layers(layer, layers, x, state))
  cost = cost._replace(full=cost.full * total / ran, bound=most)
  shares = (jnp.arange(total) < ran).astype(jnp.float32)
  deep = jnp.broadcast_to(1.0 * ran * layers.depth, x.shape[:2])
  return StackOutput(out.x, cache, cost, signals, deep, shares)
