# SPDX-License-Identifier: Apache-2.0
"""What the kernels for TPU share: their launch, a mask and a loop."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.ring import Scalar
from pallas_kernels.grouped_matmul.tuned import Tiles


def launch(
  kernel: Callable[..., None],
  name: str,
  out: jax.ShapeDtypeStruct,
  scalars: Sequence[jax.Array],
  operands: Sequence[jax.Array],
  *,
  grid: tuple[int, int, jax.Array],
  tiles: Tiles,
  flops: int,
  moved: int,
  interpret: Any,
  debug: bool,
  **specs: Any,
) -> jax.Array:
  """Runs a kernel over cores, strips and the items of a work list.

  Args:
    kernel: called with the references of scalars, operands, output and scratch.
    name: of the operation.
    out: shape of the result.
    scalars: prefetched into SMEM.
    operands: arrays in HBM.
    grid: cores, strips, and how many items there are (dynamic).
    tiles: says what the compiler may use.
    flops, moved: estimates, the second of elements read and written.
    interpret, debug: as in `ops.py`.
    specs: `in_specs`, `out_specs` and `scratch_shapes`.
  """
  return pl.pallas_call(
    kernel,
    out_shape=out,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars), grid=grid, **specs
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=tiles.vmem_limit_bytes,
      disable_bounds_checks=not debug,
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops,
      bytes_accessed=out.dtype.itemsize * moved,
      transcendentals=0,
    ),
    interpret=interpret,
    name=name,
  )(*scalars, *operands)


def between(low: Scalar, high: Scalar, shape: tuple[int, ...]) -> jax.Array:
  """Which rows of an array are `low .. high - 1`."""
  row = lax.broadcasted_iota(jnp.int32, shape, 0)
  return (row >= low) & (row < high)


def loop(count: int, body: Callable[[Scalar], None]) -> None:
  """`body(n)` for n < count; no loop for one."""
  if count == 1:
    body(0)
  else:
    pl.loop(0, count)(body)
