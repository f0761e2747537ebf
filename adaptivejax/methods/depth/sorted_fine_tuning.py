# SPDX-License-Identifier: Apache-2.0
r"""Sorted fine-tuning: every prefix of the layers is a language model.

Valipour et al., 2023 (SortedNet / SoFT), https://arxiv.org/abs/2309.00255
Kavehzadeh et al., 2023, https://arxiv.org/abs/2309.08968

With f_{1:n} the first n layers and the shared norm and readout, the loss is the
weighted mean over the sub-models n in S,

    loss = sum_{n in S} w_n CE(readout(f_{1:n}(x)), y) / sum_{n in S} w_n.

No new parameters; w_n = 1 is the paper's, w_n = n the weights of CALM (2022).

Departs: a weighted mean, where the paper sums.
Primitive: `nn.every_layer` (one forward pass), then one readout at a time.
Axes: L layers, B batch, T tokens, D features, V vocabulary, S sub-models.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptivejax.core.losses import cross_entropy


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

  @jax.checkpoint  # one [B, T, V] at a time, also backwards
  def loss(h):
    return cross_entropy(readout(h), targets).mean()

  losses = jax.lax.map(loss, hidden[jnp.asarray(exits) - 1])
  w = jnp.asarray(weights, jnp.float32)
  return (losses * w).sum() / w.sum()
