# SPDX-License-Identifier: Apache-2.0
"""Losses that several methods share, in f32 and in nats.

Axes: V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
  logits: Float[Array, "... V"], targets: Int[Array, "..."]
) -> Float[Array, "..."]:
  """-log softmax(`logits`)[`targets`], per position."""
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


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
