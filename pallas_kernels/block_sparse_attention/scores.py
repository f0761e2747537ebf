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
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse_attention.cuts import Cut
from pallas_kernels.block_sparse_attention.plan import BEYOND, LOG2E
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


def scaled(q: Any, rule: Rule) -> jax.Array:
  """The queries of a stack, [N, D], times their factor."""
  width = q.shape[-1]
  x = q[...].reshape(-1, width).astype(jnp.float32)
  return (x * factor(rule, width)).astype(q.dtype)


def pieces(cut: Cut) -> list[Any]:
  """The columns, in pieces."""
  step = min(cut.piece, cut.columns)
  return [
    pl.ds(at, min(step, cut.columns - at)) for at in range(0, cut.columns, step)
  ]


@dataclasses.dataclass(frozen=True)
class Scores:
  """The scores of one step, piece by piece."""

  cut: Cut
  rule: Rule
  k: jax.Array  # [W, D]
  q: Any  # ref, [N, D], already multiplied with `factor`
  query_marks: Any  # ref, [8, N]
  bits: Any  # ref, [words, N], or None
  row: Row
  step: Scalar
  masked: bool
  has_segments: bool
  has_bias: bool
  keys: list[Any]  # of each block
  by_place: bool  # positions of keys are their places

  @classmethod
  def of(
    cls, refs: Any, cut: Cut, rule: Rule, row: Row, step: Scalar, slot: Scalar,
    masked: bool, has_segments: bool, has_bias: bool,
  ) -> "Scores":  # fmt: skip
    """Of a step whose keys are in `slot`."""
    keys = []
    if masked or has_bias:
      marks = None
      if refs.key_marks is not None:
        marks = refs.marks_vmem.at[slot]
      keys = cls.columns(cut, row, step, marks)
    return cls(
      cut, rule, refs.k_vmem[slot], refs.scaled, refs.query_marks, refs.bits,
      row, step, masked, has_segments, has_bias, keys, refs.key_marks is None,
    )  # fmt: skip

  @staticmethod
  def columns(
    cut: Cut, row: Row, step: Scalar, key_marks: Any
  ) -> list[tuple[Any, ...]]:
    """Position, segment and bias of the keys of each block, [block, 1]."""
    size, out = cut.block_kv, []
    for n in range(cut.merge):
      live = step * cut.merge + n < row.total
      if key_marks is None:
        first = jnp.where(live, row.block(step, n) * size, BEYOND)
        pos = first + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        out.append((pos, None, None))
      else:
        marks = key_marks[n].T
        pos = jnp.maximum(marks[:, 0:1], jnp.where(live, -1, BEYOND))
        bias = lax.bitcast_convert_type(marks[:, 2:3], jnp.float32)
        out.append((pos, marks[:, 1:2], bias))
    return out

  def piece(self, at: Any) -> tuple[jax.Array, Any]:
    """Scores in units of log 2, f32[W, n], and the tanh of a softcap."""
    s, tanh = dot(self.k, self.q[at, :], 1, 1), None
    if self.rule.softcap is not None:
      tanh = jnp.tanh(s)
      s = tanh * (self.rule.softcap * LOG2E)
    if not (self.masked or self.has_bias):
      return s, tanh
    top, low, segment = (self.query_marks[n : n + 1, at] for n in range(3))
    if self.by_place:  # what fills the last block is no key
      top = jnp.minimum(top, self.cut.shape[4] - 1)
    parts, size = [], self.cut.block_kv
    for n, (pos, key_segment, bias) in enumerate(self.keys):
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
    bits = self.bits[pl.ds(word, 1), at]
    return ((bits >> (entry & 31)) & 1) == 1
