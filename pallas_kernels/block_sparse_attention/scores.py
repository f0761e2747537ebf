# SPDX-License-Identifier: Apache-2.0
"""Scores of a step, as both TPU kernels compute them.

Scores lie transposed, keys down the registers and queries across: what is
known of a query is then a row, which costs one number a query in memory, and a
maximum over keys is one of whole registers.

Axes: as in `stream`; n columns of a piece of N.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.plan import BEYOND, LOG2E, Cut
from pallas_kernels.block_sparse_attention.stream import Row, Scalar
from pallas_kernels.block_sparse_attention.types import NEVER, Rule


def factor(rule: Rule, width: int) -> float:
  """What queries are multiplied with: their products are powers of two then."""
  scale = width**-0.5 if rule.scale is None else rule.scale
  return scale * LOG2E if rule.softcap is None else scale / rule.softcap


def precision(dtype: Any) -> Any:
  """Of products: those of f32 are not to be rounded to bf16."""
  return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """The product over an axis of each, in f32."""
  return lax.dot_general(
    a,
    b,
    (((axis_a,), (axis_b,)), ((), ())),
    precision=precision(a.dtype),
    preferred_element_type=jnp.float32,
  )


@dataclasses.dataclass(frozen=True)
class Scores:
  """The scores of one step, piece by piece."""

  cut: Cut
  rule: Rule
  k: jax.Array  # [W, D]
  q: Any  # ref, [N, D], already multiplied with `factor`
  query_marks: Any  # ref, [8, N]
  key_marks: Any  # ref, [merge, 8, block], or None
  bits: Any  # ref, [words, N], or None
  row: Row
  step: Scalar
  masked: bool
  has_segments: bool
  has_bias: bool

  def columns(self) -> list[tuple[jax.Array, ...]]:
    """Position, segment and bias of the keys of each block, [block, 1]."""
    size, out = self.cut.block_kv, []
    for n in range(self.cut.merge):
      live = self.step * self.cut.merge + n < self.row.total
      if self.key_marks is None:
        first = jnp.where(live, self.row.block(self.step, n) * size, BEYOND)
        pos = first + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        out.append((pos, None, None))
      else:
        marks = self.key_marks[n].T
        pos = jnp.maximum(marks[:, 0:1], jnp.where(live, -1, BEYOND))
        bias = lax.bitcast_convert_type(marks[:, 2:3], jnp.float32)
        out.append((pos, marks[:, 1:2], bias))
    return out

  def piece(self, at: Any, keys: list[Any]) -> tuple[jax.Array, Any]:
    """Scores in units of log 2, f32[W, n], and the tanh of a softcap."""
    s, tanh = dot(self.k, self.q[at, :], 1, 1), None
    if self.rule.softcap is not None:
      tanh = jnp.tanh(s)
      s = tanh * (self.rule.softcap * LOG2E)
    if not (self.masked or self.has_bias):
      return s, tanh
    top, low, segment = (self.query_marks[n : n + 1, at] for n in range(3))
    if self.key_marks is None:  # what fills the last block is no key
      top = jnp.minimum(top, self.cut.shape[4] - 1)
    parts, size = [], self.cut.block_kv
    for n, (pos, key_segment, bias) in enumerate(keys):
      part = s[n * size : (n + 1) * size]
      if self.has_bias:
        part = part + bias
      if self.masked:
        last = top
        if self.bits is not None:
          last = jnp.where(self._looks(n, at), top, -1)
        seen = pos <= last
        if self.rule.window is not None:
          seen &= pos > low
        if self.has_segments:
          seen &= key_segment == segment
        part = jnp.where(seen, part, NEVER)
      parts.append(part)
    return jnp.concatenate(parts, 0), tanh

  def _looks(self, n: int, at: Any) -> jax.Array:
    """Which queries look at block `n`, bool[1, n]."""
    entry = self.step * self.cut.merge + n
    word = jnp.minimum(entry >> 5, self.bits.shape[0] - 1)
    bits = self.bits[pl_row(word), at]
    return ((bits >> (entry & 31)) & 1) == 1


def pl_row(index: Scalar) -> Any:
  """One row of a ref."""
  from jax.experimental import pallas as pl

  return pl.ds(index, 1)
