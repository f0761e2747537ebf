# SPDX-License-Identifier: Apache-2.0
"""Losses that several methods share, in f32 and in nats.

Axes: V vocabulary, L exits, D features.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.varying import vary, varying_axes


def cross_entropy(
  logits: Float[Array, "... V"], targets: Int[Array, "..."]
) -> Float[Array, "..."]:
  """-log softmax(`logits`)[`targets`], per position."""
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


def exit_cross_entropy(
  hidden: Float[Array, "L *B D"],
  readout: Callable[[Array], Array],
  targets: Int[Array, "*B"],
  weights: Float[Array, " L"],
) -> Float[Array, ""]:
  """Weighted mean over exits of the mean cross-entropy at each.

  Args:
    hidden: after every layer.
    readout: hidden state to logits.
    targets: classes.
    weights: of each exit, at least 0 and not all 0; an exit of weight 0 is not
      computed (dynamic).
  """

  @jax.checkpoint  # the logits of one exit at a time, also backwards
  def loss(h):
    return cross_entropy(readout(h), targets).mean()

  def weighted(h_weight):
    h, weight = h_weight
    none = vary(jnp.zeros((), jnp.float32), varying_axes((h, targets)))
    return weight * jax.lax.cond(weight > 0, loss, lambda _: none, h)

  return jax.lax.map(weighted, (hidden, weights)).sum() / weights.sum()


def binary_cross_entropy(
  logits: Float[Array, "..."], targets: Bool[Array, "..."]
) -> Float[Array, "..."]:
  """-log sigmoid of the right side, per element."""
  logits = logits.astype(jnp.float32)
  return jax.nn.softplus(jnp.where(targets, -logits, logits))


def accuracy(
  logits: Float[Array, "... V"], targets: Int[Array, "..."]
) -> Float[Array, ""]:
  """Share of positions whose most likely class is the target."""
  return (logits.argmax(-1) == targets).mean(dtype=jnp.float32)
