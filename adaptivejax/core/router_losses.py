# SPDX-License-Identifier: Apache-2.0
"""Losses of routers, in f32 and in nats: balance, sureness, locality.

They look at live items only, all of them together.

Axes: B batch, T tokens, N items, E experts, K choices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.dispatch import NOBODY, expert_load


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
  chosen = expert_load(jnp.where(live[..., None], experts, NOBODY), p.shape[-1])
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


def sequence_load_balance(
  probabilities: Float[Array, "*B T E"],
  experts: Int[Array, "*B T K"],
  live: Bool[Array, "*B T"] | None = None,
) -> Float[Array, ""]:
  """`load_balance` within each sequence, mean over those with live items."""
  live = jnp.ones(experts.shape[:-1], bool) if live is None else live
  rows = lambda a: a.reshape(-1, live.shape[-1], *a.shape[live.ndim :])
  each = jax.vmap(load_balance)(rows(probabilities), rows(experts), rows(live))
  return _mean(each, rows(live).any(-1))


def router_z(
  logits: Float[Array, "*N E"], live: Bool[Array, "*N"] | None = None
) -> Float[Array, ""]:
  """Mean of logsumexp(`logits`)^2, which keeps them small.

  Zoph et al., 2022 (eq. 5), https://arxiv.org/abs/2202.08906
  """
  log_z = jax.nn.logsumexp(_there(logits, live), axis=-1)
  return _mean(log_z**2, live)


def router_entropy(
  logits: Float[Array, "*N E"], live: Bool[Array, "*N"] | None = None
) -> Float[Array, ""]:
  """Mean entropy of softmax(`logits`): low where routers are decided."""
  p, log_p = _softmax(_there(logits, live))
  return _mean(-(p * log_p).sum(-1), live)


def router_divergence(
  logits: Float[Array, "*N E"],
  wanted: Float[Array, "*N E"],
  live: Bool[Array, "*N"] | None = None,
) -> Float[Array, ""]:
  """Mean KL(softmax(`logits`) | softmax(`wanted`))."""
  p, log_p = _softmax(_there(logits, live))
  log_q = jax.nn.log_softmax(_there(wanted, live))
  return _mean((p * (log_p - jnp.where(p > 0, log_q, 0))).sum(-1), live)


def chunk_sparsification(
  scores: Float[Array, "*B T E"],
  chunk: int,
  live: Bool[Array, "*B T"] | None = None,
) -> Float[Array, ""]:
  """Probability that a chunk of tokens in a row uses an expert, mean over both.

  Song et al., 2025, https://arxiv.org/abs/2507.08771

  Args:
    scores: at least 0; a token uses expert i with probability s_i / sum s, and
      none if all are 0.
    chunk: tokens; those of a sequence need not be a multiple (static).
    live: tokens that count; a chunk without any does not.
  """
  if chunk < 1:
    raise ValueError(f"{chunk=} must be at least 1 token.")
  live = jnp.ones(scores.shape[:-1], bool) if live is None else live
  scores = jnp.where(live[..., None], scores, 0)
  total = scores.sum(-1, keepdims=True)
  p = scores / jnp.where(total > 0, total, 1)
  *lead, tokens, experts = p.shape
  chunk = min(chunk, tokens)
  pad = [(0, 0)] * len(lead) + [(0, -tokens % chunk)]
  p = jnp.pad(p, [*pad, (0, 0)]).reshape(-1, chunk, experts)
  there = jnp.pad(live, pad).reshape(-1, chunk).any(1)
  return _mean(1 - jnp.prod(1 - p, axis=1).mean(-1), there)


def activation_locality(
  logits: Float[Array, "*B T E"], live: Bool[Array, "*B T"] | None = None
) -> Float[Array, ""]:
  """Binary cross-entropy of a token's experts given those of the one before.

  Song et al., 2025, https://arxiv.org/abs/2507.08771; mean over neighbours that
  are both live, 0 without any.
  """
  live = jnp.ones(logits.shape[:-1], bool) if live is None else live
  logits = _there(logits, live)
  before, now = logits[..., :-1, :], logits[..., 1:, :]
  loss = jax.nn.softplus(before) - jax.nn.sigmoid(now) * before
  return _mean(loss.mean(-1), live[..., :-1] & live[..., 1:])


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


def _there(logits, live) -> Float[Array, "*N E"]:
  """In f32, 0 where there is no item: what it holds must reach no gradient."""
  logits = logits.astype(jnp.float32)
  return logits if live is None else jnp.where(live[..., None], logits, 0)


def _softmax(logits) -> tuple[Array, Array]:
  """And its log, 0 where an expert is ruled out by -inf."""
  log_p = jax.nn.log_softmax(logits)
  p = jnp.exp(log_p)
  return p, jnp.where(p > 0, log_p, 0)


def _mean(
  values: Float[Array, "*N"], live: Bool[Array, "*N"] | None
) -> Float[Array, ""]:
  if live is None:
    return values.mean()
  items = jnp.maximum(live.sum(dtype=jnp.float32), 1)
  return jnp.where(live, values, 0).sum() / items
