# SPDX-License-Identifier: Apache-2.0
r"""Draft tokens kept or replaced, so that the text is the target's own.

Leviathan et al., 2023, https://arxiv.org/abs/2211.17192
Chen et al., 2023, https://arxiv.org/abs/2302.01318

With q_i the distribution that token x_i of a draft was drawn from and p_i the
target's at the same place, speculative sampling keeps x_i with probability

    min(1, p_i(x_i) / q_i(x_i)),

up to the first it does not keep, which a draw from max(p_i - q_i, 0),
normalised, replaces; if all d are kept, a draw from p_d follows.  The tokens
are then distributed as the target's, whatever q is.  Greedy p and q are
one-hot, and the same rule is exact matching.

Axes: B batch, d draft tokens, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.sampling import ACCEPT, TOKEN, Draw


class Verified(NamedTuple):
  """Tokens of the text.

  Attributes:
    tokens: what was kept of the draft, and one token more; 0 past `count`,
      i32[B, d + 1].
    count: tokens that are valid, in 1..d + 1, i32[B].
  """

  tokens: Array
  count: Array


def draft_verify(
  draft: Int[Array, "B d"],
  draft_log: Float[Array, "B d V"],
  target_log: Float[Array, "B d1 V"],
  draw: Draw,
  at: Int[Array, " B"],
  live: Bool[Array, "B d"] | None = None,
) -> Verified:
  """The longest part of a draft that may stay, and the token after it.

  Args:
    draft: tokens drawn with the salt `sampling.DRAFT`, or given; d may be 0.
    draft_log: log q, normalised; one-hot (0 and -inf) for a given token.
    target_log: log p before each draft token and after the last, d + 1 places.
    draw: the random numbers; both distributions are at its settings.
    at: position in the text of `draft[:, 0]` (dynamic).
    live: draft tokens that exist; a row's draft ends before the first that
      does not.  All of them if not given.

  Raises:
    ValueError: shapes that do not fit one another.
  """
  batch, d = draft.shape
  if target_log.shape[:2] != (batch, d + 1) or draft_log.shape != (
    *draft.shape,
    target_log.shape[2],
  ):
    raise ValueError(
      f"a draft of shape {draft.shape} needs a distribution before each token"
      f" and a target after the last: {draft_log.shape=} must be [B, d, V] and"
      f" {target_log.shape=} must be [B, d + 1, V]."
    )
  live = jnp.ones((batch, d), bool) if live is None else live
  coins = jax.vmap(lambda i: draw.uniform(at + i, ACCEPT), out_axes=1)
  chosen = lambda log: jnp.exp(_at(log, draft, axis=2))
  # p / q without the division: also right where q = 0
  accept = coins(jnp.arange(d)) * chosen(draft_log) < chosen(target_log[:, :d])
  kept = jnp.cumprod(accept & live, axis=1, dtype=jnp.int32).sum(1)

  # one place more, where the draft has ended and nothing is refused
  longer = lambda a: jnp.pad(a, ((0, 0), (0, 1), (0, 0))[: a.ndim])
  target = _at(target_log, kept)
  left = jnp.maximum(jnp.exp(target) - jnp.exp(_at(longer(draft_log), kept)), 0)
  # p = q may be refused by a rounding error, and then leaves nothing
  some = left.max(1) >= jnp.finfo(jnp.float32).tiny
  refused = _at(longer(live), kept) & some
  last = jnp.where(refused[:, None], jnp.log(left), target)
  last = draw.categorical(last, at + kept, TOKEN)

  place = jnp.arange(d + 1) - kept[:, None]
  tokens = jnp.where(place < 0, longer(draft), 0)
  tokens = jnp.where(place == 0, last[:, None], tokens)
  return Verified(tokens, kept + 1)


def _at(values, index, axis=1):
  """`values` at one index of `axis` per leading axes, which it drops."""
  index = jnp.expand_dims(index, tuple(range(axis, values.ndim)))
  taken = jnp.take_along_axis(values, index, axis=axis, mode="clip")
  return taken.squeeze(axis)
