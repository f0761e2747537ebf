# SPDX-License-Identifier: Apache-2.0
r"""FFN-SkipLLM: a token skips feed-forward layers that no longer move it.

Jaiswal et al., 2024, https://arxiv.org/abs/2404.03865

After attention at layer l, with h the hidden state, the feed-forward output is
compared with its input,

    c_l = cos(h, h + FFN_l(h)),

and once c_l >= tau the following feed-forward layers are skipped, but never in
the cold layers (the first and the last ones), nor for the first tokens, nor
beyond a budget of layers.  Attention always runs: every layer writes true keys.

Primitive: `bucketed` on the feed-forward half.
Departs: applies to prompt tokens too (the rule is per token); cold layers are
given by number instead of by a calibration run.
Axes: L layers, B batch, T tokens, D features.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from adaptivejax.core.halting import saturation
from adaptivejax.nn.block import Block
from adaptivejax.nn.stack import StackOutput, layer_count


def ffn_skip(
  layers,
  x: Float[Array, "B T D"],
  positions,
  cache=None,
  *,
  readout,
  key=None,
  threshold: Float[Array, ""] | float,
  cold_first=1,
  cold_last=1,
  budget=1.0,
  warm_up=0,
) -> StackOutput:
  """A stack that skips saturated feed-forward layers.

  Args:
    threshold: tau; above 1 never skips (dynamic).
    cold_first: first layers that never skip (dynamic).
    cold_last: last layers that never skip (dynamic).
    budget: largest share of all feed-forward layers to skip (dynamic).
    warm_up: positions below this never skip (dynamic).

  Other arguments as in `nn.stack`.  `depth` counts a skipped feed-forward layer
  as half a layer.
  """
  del readout
  if not isinstance(layers, Block):
    raise ValueError(
      f"ffn_skip runs the two halves of a `Block` apart; this model stacks"
      f" {type(layers).__name__}. Decode it with `plain`."
    )
  total = layer_count(layers)

  def body(carry, step):
    x, cache, saturated, skipped = carry
    block, l, key = step
    x, cache, cost, penalty = block.attend(x, positions, cache, l, None, key)
    free = (l >= cold_first) & (l < total - cold_last) & (positions >= warm_up)
    skip = saturated & free & (skipped + 1 <= budget * total)
    y, feed_cost, signals = block.feed(x, ~skip, key)
    saturated = saturated | (saturation(x, y) >= threshold)
    carry = y, cache, saturated, skipped + skip
    return carry, (cost + feed_cost, signals.owing(penalty))

  none = jnp.zeros_like(x[..., 0], bool), jnp.zeros_like(x[..., 0], jnp.int32)
  keys = None if key is None else jax.random.split(key, total)
  steps = layers, jnp.arange(total, dtype=jnp.int32), keys
  (x, cache, _, skipped), (cost, signals) = lax.scan(
    body, (x, cache, *none), steps
  )
  depth = total - skipped.astype(jnp.float32) / 2
  signals = signals.mean()
  return StackOutput(x, cache, cost.total(), signals, depth, cost.share)
