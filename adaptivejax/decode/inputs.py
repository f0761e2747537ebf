# SPDX-License-Identifier: Apache-2.0
"""What the engine is given, checked before anything is traced.

Axes: B batch, T tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from adaptivejax.nn.policy import ByStack, Policy


def bound(policy) -> Policy:
  """A policy; a stack becomes one whose thresholds are data."""
  if isinstance(policy, Policy):
    return policy
  if not callable(policy):
    raise ValueError(
      "a policy is a `Policy` or a stack, as in `Partial(calm, threshold=0.9)`;"
      f" got {policy!r}."
    )
  return ByStack(policy if isinstance(policy, Partial) else Partial(policy))


def checked(tokens, vocab: int, lengths):
  """Tokens of a vocabulary, i32[B, T], and how many of each row are real."""
  tokens = jnp.asarray(tokens)
  if tokens.ndim != 2 or 0 in tokens.shape:
    raise ValueError(
      f"tokens must be [batch, length] with at least one of each; got shape"
      f" {tokens.shape}."
    )
  lengths = row_numbers("lengths", lengths, *tokens.shape)
  if known(tokens):
    values = np.asarray(tokens)
    low, high = values.min(), values.max()
    if low < 0 or high >= vocab:
      raise ValueError(
        f"tokens must lie in 0..{vocab - 1}, the model's vocabulary; got"
        f" {low}..{high}."
      )
  return tokens, lengths


def row_numbers(name: str, numbers, rows: int, most: int):
  """A number of tokens in 1..most for each row, i32[B]; `most` if not given."""
  numbers = np.full(rows, most) if numbers is None else numbers
  numbers = np.asarray(numbers) if known(numbers) else numbers
  whole = jnp.issubdtype(numbers.dtype, jnp.integer)
  if numbers.shape != (rows,) or not whole:
    raise ValueError(
      f"`{name}` must be one whole number per row, [{rows}]; got {numbers}."
    )
  if known(numbers) and (numbers.min() < 1 or numbers.max() > most):
    raise ValueError(
      f"`{name}` must lie in 1..{most} tokens, none of them empty; got"
      f" {numbers}."
    )
  return jnp.asarray(numbers, jnp.int32)


def known(value) -> bool:
  """Whether a value can be looked at; what is traced cannot."""
  return not isinstance(value, jax.core.Tracer)
