# SPDX-License-Identifier: Apache-2.0
"""An order of tokens in which all devices of a causal ring compute alike.

Of a text laid out in order over n devices, device i sees i + 1 of n shards, and
in each turn of the ring (`core.ring`) some device computes a whole one: n
turns, where (n + 1) / 2 would do if all computed alike.  Striped attention
(Brandon et al., 2023, https://arxiv.org/abs/2311.09431) gives token p to device
p mod n: each visit is then a triangle, nearly half a shard for everyone.

Who sees whom is a matter of positions, which are data, so nothing else changes:
a caller lays out tokens, their positions and targets `striped`, and what comes
out `unstriped`.  It is for dense attention: key blocks are of neighbours in the
array, so methods that choose blocks would choose among others.

Axes: B batch, T tokens.
"""

import jax.numpy as jnp
from jaxtyping import Array


def striped(x: Array, devices: int) -> Array:
  """Tokens [B, T, ...] in the order that balances a causal ring.

  Laid out over `devices` (static), which divide T, each then holds every
  `devices`-th token.  `unstriped` undoes it.
  """
  _check_stripes(x, devices)
  return _transposed(x, x.shape[1] // devices)


def unstriped(x: Array, devices: int) -> Array:
  """Undoes `striped`."""
  _check_stripes(x, devices)
  return _transposed(x, devices)


def _transposed(x, rows):
  """Tokens as a matrix of `rows`, column by column."""
  columns = x.reshape(x.shape[0], rows, -1, *x.shape[2:])
  return jnp.swapaxes(columns, 1, 2).reshape(x.shape)


def _check_stripes(x, devices) -> None:
  if x.ndim < 2 or devices < 1 or x.shape[1] % devices:
    raise ValueError(
      f"{devices=} must divide the tokens of x [B, T, ...]; got {x.shape}: pad"
      " the sequence, or take other devices."
    )
