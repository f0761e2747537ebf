# SPDX-License-Identifier: Apache-2.0
"""Memory and compile time of a program, beside `adaptivejax.report.clock`."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from adaptivejax.report.clock import interleave


def temp_bytes(step: Callable[..., Any], *args: Any) -> float:
  """Scratch memory of the compiled `step`; NaN where XLA does not tell."""
  stats = jax.jit(step).lower(*args).compile().memory_analysis()
  return float(stats.temp_size_in_bytes) if stats else math.nan


def compile_seconds(
  steps: Sequence[Callable[..., Any]],
  *args: Any,
  seconds: float,
  least: int = 3,
) -> list[list[float]]:
  """Times trace + lower + compile of each step, every cache empty."""

  def compiler(step):
    return lambda _: jax.jit(step).lower(*args).compile() and None

  with no_compilation_cache():
    return interleave(
      [compiler(step) for step in steps],
      seconds=seconds,
      least=least,
      floor=0.0,
      before=jax.clear_caches,
    )


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
  """Turns the persistent compilation cache off; JAX must be told twice."""
  enabled = jax.config.values["jax_enable_compilation_cache"]
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()
