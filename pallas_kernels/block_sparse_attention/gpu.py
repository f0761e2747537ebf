# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on Hopper GPUs, forward: the call.

The kernel is in `gpu_kernel`, how the work is cut in `gpu_plan`.  Needs jax >=
0.11 (Mosaic GPU); with 0.12 `interpret=plgpu.InterpretGPUParams()` runs it on
any machine.

Axes: as in `types`.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention import gpu_plan
from pallas_kernels.block_sparse_attention.gpu_kernel import attend
from pallas_kernels.block_sparse_attention.gpu_plan import PIECE, ROWS, WIDTHS
from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  Attended,
  BlockLists,
  Marks,
  Rule,
)
from pallas_kernels.mosaic_gpu import kernel, too_old


def forward(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lists: BlockLists,
  marks: Marks = UNMARKED,
  rule: Rule = CAUSAL,
  *,
  mass: bool = False,
  interpret: Any = None,
) -> Attended:
  """Attention over the listed blocks.

  Args:
    q, k, v, lists, marks, rule, mass: as in `reference`; `v` must be finite.
    interpret: `plgpu.InterpretGPUParams()` runs the kernel on the CPU.

  Raises:
    ValueError: what `unfit` says.
  """
  if reason := unfit(q, k, v, lists, rule, mass=mass):
    raise ValueError(reason)
  lists = gpu_plan.split(lists)
  sizes = gpu_plan.sizes(q, k, v, lists, marks)
  told = gpu_plan.told(sizes.cut, lists, marks, rule)
  batch, heads, _, queries, *_, value_width = sizes.cut.shape
  q, k, v = map(gpu_plan.whole_rows, (q, k, v))
  inputs: dict[str, Any] = {"q": q, "k": k, "v": v, **told._asdict()}
  inputs |= {f"key_{name}": x for name, x in inputs.pop("keys").items()}
  inputs = {name: x for name, x in inputs.items() if x is not None}
  like = jax.ShapeDtypeStruct
  padded = sizes.cut.tiles * sizes.cut.block_q
  outputs = {
    "out": like((batch, heads, q.shape[2], value_width), q.dtype),
    "lse": like((batch, heads, padded), jnp.float32),
  }
  names = *inputs, *outputs

  def body(*refs, **scratch):
    named = dict(zip(names, refs))
    attend(SimpleNamespace(**named, **scratch), sizes, rule)

  out, lse = kernel(
    body,
    out_type=tuple(outputs.values()),
    grid=(sizes.grid,),
    grid_names=("item",),
    num_threads=sizes.multipliers + 1,
    thread_name="wg",
    scratch_types=_scratch(sizes, q.dtype, interpret is not None),
    compiler_params=plgpu.CompilerParams(
      approx_math=True, reduction_scratch_bytes=0
    ),
    cost_estimate=pl.CostEstimate(
      flops=gpu_plan.flops(sizes),
      transcendentals=0,
      bytes_accessed=2 * (2 * q.size + k.size + v.size),
    ),
    kernel_name="block_sparse_attention",
    interpret=interpret,
  )(*inputs.values())
  return Attended(out[:, :, :queries], lse[:, :, :queries])


def unfit(
  q: Any, k: Any, v: Any, lists: BlockLists, rule: Rule, *, mass: bool = False
) -> str | None:
  """Why the kernel does not take it; None if it does.

  Args:
    q, k, v: anything with shape and dtype.
    lists, rule, mass: as in `forward`.
  """
  if reason := too_old():
    return reason
  if q.dtype not in (jnp.bfloat16, jnp.float16) or {k.dtype, v.dtype} != {
    jnp.dtype(q.dtype)
  }:
    return (
      f"q, k and v must be all bfloat16 or all float16 on a GPU; got {q.dtype},"
      f" {k.dtype} and {v.dtype}: cast them"
    )
  if q.shape[3] not in WIDTHS or v.shape[3] not in WIDTHS:
    return (
      f"heads must be {WIDTHS} wide on a GPU; got {q.shape[3]} and"
      f" {v.shape[3]}: pad them with zeros"
    )
  if lists.block_q % PIECE or lists.block_kv % min(WIDTHS):
    return (
      f"block_q and block_kv must be multiples of {PIECE} on a GPU; got"
      f" {lists.block_q} and {lists.block_kv}"
    )
  if rule.scale is not None and rule.scale <= 0:
    return f"scale must be positive on a GPU; got {rule.scale}"
  if mass:
    return "the GPU kernel does not return mass: use `xla.forward`"
  return None


def _scratch(sizes: gpu_plan.Sizes, dtype: Any, interpreted: bool) -> dict:
  """What a thread block holds; q is also where its output passes through."""
  stages, groups = sizes.stages, sizes.multipliers
  width, value_width = sizes.cut.shape[-2:]
  block = sizes.cut.block_kv

  def shared(*shape):
    tiling = plgpu.TilingTransform((ROWS, 64))
    swizzle = plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))

  ring = lambda dtype: plgpu.SMEM((stages, block), dtype)
  kinds = {"pos": jnp.int32, "segment": jnp.int32, "bias": jnp.float32}
  found = {
    "q_shared": shared(groups, PIECE, width),
    "k_ring": shared(stages, block, width),
    "v_ring": shared(stages, block, value_width),
    "lse_shared": plgpu.SMEM((groups, PIECE), jnp.float32),
    "mark_rings": {name: ring(kinds[name]) for name in sizes.marks},
    "q_full": plgpu.Barrier(num_barriers=groups),
    "k_full": plgpu.Barrier(
      num_arrivals=1 + len(sizes.marks), num_barriers=stages
    ),
    "v_full": plgpu.Barrier(num_barriers=stages),
    "k_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    "v_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
  }
  if value_width != width:
    found["out_shared"] = shared(groups, PIECE, value_width)
  if interpreted:
    found["weights"] = shared(groups, PIECE, block)
  return found
