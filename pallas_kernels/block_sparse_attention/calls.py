# SPDX-License-Identifier: Apache-2.0
"""The operands of both TPU kernels: how arrays are cut, and how they come back.

Axes: as in `cuts`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import plan, stream
from pallas_kernels.block_sparse_attention.cuts import Cut
from pallas_kernels.block_sparse_attention.plan import LOG2E, MARKS
from pallas_kernels.block_sparse_attention.types import Marks
from pallas_kernels.varying import result


@dataclasses.dataclass(frozen=True)
class Operand:
  """An array that a kernel reads or writes, and the block of it at a step."""

  array: Any
  spec: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class Operands:
  """Makes the operands of a cut."""

  cut: Cut

  def _spec(self, block: tuple[Any, ...], index: Callable[..., Any], out=False):
    """A block by batch, work head and tile; outputs are of the part."""

    def index_map(core, b, m, t, words, start):
      b, m, t = self.cut.place(core, b, m, t)
      if not out:
        b, m = b + start[0], m + start[1]
      return index(b, m, t)

    return pl.BlockSpec(block, index_map)

  def tile(self, x: jax.Array) -> Operand:
    """Queries and their like, [B, H, T, D], block [stack, block_q, D]."""
    cut, width = self.cut, x.shape[-1]
    x = padded(x, cut.tiles * cut.block_q)
    x = x.reshape(x.shape[0], cut.heads, cut.stack, -1, width)
    block = (None, None, cut.stack, cut.block_q, width)
    return Operand(x, self._spec(block, lambda b, m, t: (b, m, 0, t, 0)))

  def tile_out(self, width: int, dtype: Any) -> Operand:
    cut = self.cut
    batch, heads, tiles = cut.part
    shape = batch, heads, cut.stack, tiles * cut.block_q, width
    block = (None, None, cut.stack, cut.block_q, width)
    index = lambda b, m, t: (b, m, 0, t, 0)
    return Operand(
      jax.ShapeDtypeStruct(shape, dtype), self._spec(block, index, out=True)
    )

  def row(self, x: jax.Array, fill: float) -> Operand:
    """A number for each query, f32[B, H, T], block [1, N]."""
    cut = self.cut
    spare = cut.tiles * cut.block_q - x.shape[2]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, spare)), constant_values=fill)
    x = x.reshape(-1, cut.heads, cut.stack, cut.tiles, cut.block_q)
    x = jnp.moveaxis(x, 2, 3).reshape(
      -1, *x.shape[1:2], cut.tiles, 1, cut.columns
    )
    block = (None, None, None, 1, cut.columns)
    return Operand(x, self._spec(block, lambda b, m, t: (b, m, t, 0, 0)))

  def rows_out(self, *block: int) -> Operand:
    """For each tile an array of f32."""
    batch, heads, tiles = self.cut.part
    shape = jax.ShapeDtypeStruct((batch, heads, tiles, *block), jnp.float32)
    index = lambda b, m, t: (b, m, t, 0, 0)
    return Operand(shape, self._spec((None, None, None, *block), index, True))

  def head_out(self, rows: int, width: int, dtype: Any) -> Operand:
    """[rows, width] for each key head, there while its work heads last."""
    batch, heads, _ = self.cut.part
    per_key_head = self.cut.per_key_head
    shape = jax.ShapeDtypeStruct(
      (batch, heads // per_key_head, rows, width), dtype
    )

    def index(b, m, t):
      return b, lax.div(m, per_key_head) if per_key_head > 1 else m, 0, 0

    return Operand(shape, self._spec((None, None, rows, width), index, True))

  def query_marks(self, x: jax.Array) -> Operand:
    """Of `plan.query_marks`."""
    index = lambda b, m, t: (b if x.shape[0] > 1 else 0, t, 0, 0)
    block = (None, None, MARKS, self.cut.columns)
    return Operand(x, self._spec(block, index))

  def bits(self, x: jax.Array) -> Operand:
    """Of `plan.Rows`."""

    def index(b, m, t):
      if self.cut.per_list > 1:
        m = lax.div(m, self.cut.per_list)
      return b if x.shape[0] > 1 else 0, m, t, 0, 0

    block = (None, None, None, x.shape[3], self.cut.columns)
    return Operand(x, self._spec(block, index))

  def sinks(self, x: jax.Array) -> Operand:
    """f32[H], in units of log 2, as a row for each work head."""
    cut = self.cut
    x = jnp.repeat(x.astype(jnp.float32) * LOG2E, cut.block_q)
    x = x.reshape(cut.heads, 1, cut.columns)
    index = lambda b, m, t: (m, 0, 0)
    return Operand(x, self._spec((None, 1, cut.columns), index))

  def keys(
    self, k: jax.Array, v: jax.Array, marks: Marks, key_marks: Any
  ) -> dict[str, Operand]:
    """What `Stream` loads; what is no key is made 0."""
    if marks.kv_pos is not None:
      some = (marks.kv_pos >= 0)[..., None]
      k, v = jnp.where(some, k, 0), jnp.where(some, v, 0)
    size = self.cut.blocks * self.cut.block_kv
    arrays = {"k": padded(k, size), "v": padded(v, size)}
    if key_marks is not None:
      arrays["key_marks"] = key_marks
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return {name: Operand(x, in_hbm) for name, x in arrays.items()}


def padded(x: jax.Array, size: int) -> jax.Array:
  """`x`, with zeros up to `size` on the axis before the last."""
  spare = size - x.shape[2]
  return jnp.pad(x, ((0, 0), (0, 0), (0, spare), (0, 0))) if spare else x


def joined(cut: Cut, x: jax.Array) -> jax.Array:
  """Puts the parts together: [parts, batch, heads, ...] to [B, heads, ...]."""
  over_batch, over_heads = cut.parts
  _, batch, heads, *rest = x.shape
  x = x.reshape(over_batch, over_heads, batch, heads, *rest).swapaxes(1, 2)
  return x.reshape(over_batch * batch, over_heads * heads, *rest)


def of_queries(cut: Cut, x: jax.Array) -> jax.Array:
  """[B, M, Q, stack, block_q], in any shape, to [B, H, T]."""
  x = x.reshape(-1, cut.heads, cut.tiles, cut.stack, cut.block_q)
  x = jnp.moveaxis(x, 3, 2).reshape(len(x), cut.shape[1], -1)
  return x[:, :, : cut.shape[3]]


def run(
  kernel: Callable[..., None],
  cut: Cut,
  rows: plan.Rows,
  inputs: Mapping[str, Operand],
  outputs: Mapping[str, Operand],
  scratch: Mapping[str, Any],
  *,
  name: str,
  flops: int,
  first: Any = 0,
  interpret: Any,
  debug: bool,
) -> dict[str, jax.Array]:
  """Calls `kernel(namespace of refs)` for every part.

  Optional operands that a call has none of are None.  `first` is the first key
  block of a pass.
  """
  words, starts = plan.in_parts(cut, rows.words, first)
  names = ["words", "start", *inputs, *outputs, *scratch]
  optional = {"bits": None, "sinks": None, "key_marks": None}

  def body(*refs):
    kernel(SimpleNamespace(**(optional | dict(zip(names, refs)))))

  arrays = [x.array for x in inputs.values()]
  made = lambda like: result(like.shape, like.dtype, words, *arrays)
  call = pl.pallas_call(
    body,
    out_shape=[made(x.array) for x in outputs.values()],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(cut.cores, *cut.extent),
      in_specs=[x.spec for x in inputs.values()],
      out_specs=[x.spec for x in outputs.values()],
      scratch_shapes=list(scratch.values()),
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
      vmem_limit_bytes=cut.vmem_limit_bytes,
      disable_bounds_checks=not debug,
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops // len(words),
      bytes_accessed=sum(x.array.nbytes for x in inputs.values()),
      transcendentals=0,
    ),
    interpret=interpret,
    name=name,
  )
  each = lambda part: call(*part, *arrays)
  if len(words) == 1:
    results = [x[None] for x in each((words[0], starts[0]))]
  else:
    results = lax.map(each, (words, starts))
  return {n: joined(cut, x) for n, x in zip(outputs, results)}


def flops(cut: Cut, width: int) -> int:
  """Of products of all entries with `width` features in all."""
  batch, heads, *_ = cut.shape
  *_, tiles, capacity = cut.lists
  pairs = tiles * cut.block_q * capacity * cut.block_kv
  return 2 * batch * heads * pairs * width


def stream_of(refs: SimpleNamespace, cut: Cut, core: Any) -> stream.Stream:
  """The stream of keys of a kernel."""
  marked = refs.key_marks is not None
  hbm = (refs.k, refs.v) + ((refs.key_marks,) if marked else ())
  vmem = (refs.k_vmem, refs.v_vmem) + ((refs.marks_vmem,) if marked else ())
  return stream.Stream(
    cut, refs.words, refs.start, hbm, vmem, refs.sems, refs.cursor,
    core,
  )  # fmt: skip
