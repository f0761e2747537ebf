# SPDX-License-Identifier: Apache-2.0
"""What the kernels for Hopper GPUs share: where they run, how they start."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

OLDEST = (0, 11)
"""The jax whose Mosaic GPU compiles them; their interpreter needs 0.12."""


def too_old() -> str | None:
  """Why this jax cannot compile them; None if it can."""
  if jax.__version_info__ >= OLDEST:
    return None
  return (
    f"the GPU kernel needs jax >= 0.11 and this is {jax.__version__}: use the"
    " XLA form or the reference, or a newer jax (Python 3.12)"
  )


def on_hopper() -> bool:
  """Whether there are GPUs, and all of them have wgmma."""
  try:
    found = jax.local_devices(backend="cuda")
  except RuntimeError:
    return False
  return bool(found) and all(d.compute_capability == "9.0" for d in found)


def kernel(
  body: Callable[..., None], *, cost_estimate: pl.CostEstimate, **how: Any
) -> Callable[..., Any]:
  """`plgpu.kernel`, which takes no cost before jax 0.12."""
  if jax.__version_info__ >= (0, 12):
    how["cost_estimate"] = cost_estimate
  return plgpu.kernel(body, **how)
