# SPDX-License-Identifier: Apache-2.0
"""Losses that several methods share, in f32 and in nats.

Those of routers look at live items only, all of them together.

Axes: V vocabulary, L exits, D features, N items, E experts, K choices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.dispatch import NOBODY, load
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


def expert_use(
  probabilities: Float[Array, "*N E"],
  experts: Int[Array, "*N K"],
  live: Bool[Array, "*N"] | None = None,
) -> tuple[Float[Array, " E"], Float[Array, " E"]]:
  """How much each expert is used, and how much it is wanted.

  Fedus et al., 2021 (eqs. 5-6), https://arxiv.org/abs/2101.03961

  Args:
    probabilities: of the router; they carry the gradient.
    experts: the choices, NOBODY (-1) where there is none.
    live: items that count; all, if not given.

  Returns:
    `(f, P)`: items that chose each expert, and its probability, both per item.
  """
  p = probabilities.astype(jnp.float32)
  live = jnp.ones(p.shape[:-1], bool) if live is None else live
  items = jnp.maximum(live.sum(dtype=jnp.float32), 1)
  chosen = load(jnp.where(live[..., None], experts, NOBODY), p.shape[-1])
  wanted = jnp.where(live[..., None], p, 0).reshape(-1, p.shape[-1]).sum(0)
  return chosen / items, wanted / items


def load_balance(
  probabilities: Float[Array, "*N E"],
  experts: Int[Array, "*N K"],
  live: Bool[Array, "*N"] | None = None,
) -> Float[Array, ""]:
  """E sum_e f_e P_e: K where K choices are spread evenly, E K at worst.

  Fedus et al., 2021 (eq. 4), https://arxiv.org/abs/2101.03961; arguments as in
  `expert_use`.
  """
  used, wanted = expert_use(probabilities, experts, live)
  return probabilities.shape[-1] * (used * wanted).sum()


def router_z(
  logits: Float[Array, "*N E"], live: Bool[Array, "*N"] | None = None
) -> Float[Array, ""]:
  """Mean of logsumexp(`logits`)^2, which keeps them small.

  Zoph et al., 2022 (eq. 5), https://arxiv.org/abs/2202.08906
  """
  log_z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
  return _mean(log_z**2, live)


def router_entropy(
  logits: Float[Array, "*N E"], live: Bool[Array, "*N"] | None = None
) -> Float[Array, ""]:
  """Mean entropy of softmax(`logits`): low where routers are decided."""
  log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  return _mean(-(jnp.exp(log_p) * log_p).sum(-1), live)


def excess_load(
  bias: Float[Array, " E"], excess: Float[Array, " E"]
) -> Float[Array, ""]:
  """Zero, but its gradient by `bias` is `excess` and nothing else's is.

  So balancing without a loss (Wang et al., 2024,
  https://arxiv.org/abs/2408.15664) needs no state beside the parameters: steps
  of fixed size against the sign of this gradient are its rule, and the gradient
  is summed over devices and accumulated steps as every other is.
  """
  stop = jax.lax.stop_gradient
  return ((bias - stop(bias)) * stop(excess)).sum()


def _mean(
  values: Float[Array, "*N"], live: Bool[Array, "*N"] | None
) -> Float[Array, ""]:
  if live is None:
    return values.mean()
  items = jnp.maximum(live.sum(dtype=jnp.float32), 1)
  return jnp.where(live, values, 0).sum() / items
