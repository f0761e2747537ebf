# SPDX-License-Identifier: Apache-2.0
"""Linear attention on TPU: cycles of our kernels and of all pairs, without one.

Read from the schedules of the TPU compiler (`benchmarks.tpu_schedule`); needs
libtpu, `pip install 'adaptivejax[aot-tpu]'`.  Figures are cycles per token of
one head of width 128, in bf16, on one core, for a decay by head; `by token` is
for a decay of each token.  `quadratic` is XLA's (q k^T * decay) v over all
pairs, whose cycles per token grow with the context; ours do not.  `of peak` is
the share of the core's multiply-adds in the time of the forward pass, of those
that the chunks need; spills are vector registers put away in the main blocks.

    make aot-tpu
    python -m benchmarks.tpu_linear_attention --cases 'v5e *' --json out.json
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from adaptivejax.training.tpu_schedule import CORES, Core
from benchmarks import tpu_schedule as schedule
from benchmarks.harness import Options, Row, main
from benchmarks.tpu_simulator import simulate
from pallas_kernels.linear_attention import linear_attention
from pallas_kernels.linear_attention.specs import LONG

LENGTHS = 2048, 8192
WIDTH = LONG.width
CHUNKS = 128, 256
TARGETS = {  # cycles per token, in chunks of 256: forward, with gradient
  "v5e by head": (4.5, 11.0),
  "v6e by head": (4.0, 9.2),
}


def inputs(tokens: int, by_token: bool) -> list[Any]:
  """q, k, v and log decay."""
  wide = jax.ShapeDtypeStruct((1, 1, tokens, WIDTH), jnp.bfloat16)
  shape = (1, 1, tokens if by_token else 1)
  return [wide, wide, wide, jax.ShapeDtypeStruct(shape, jnp.float32)]


def ours(chunk: int, *args: Any) -> jax.Array:
  return linear_attention(*args, chunk=chunk)[0]


def gradients(chunk: int, *args: Any) -> tuple[jax.Array, ...]:
  run = functools.partial(linear_attention, chunk=chunk)
  results, pull = jax.vjp(run, *args)
  return pull(results)


def quadratic(q, k, v, log_decay):
  """All pairs; the gradient is not counted."""
  t = jnp.arange(q.shape[2])
  decay = jnp.exp(log_decay[..., None] * jnp.maximum(t[:, None] - t, 0))
  scores = jnp.einsum("bhid,bhjd->bhij", q, k)
  scores = jnp.where(t[:, None] >= t, scores * decay, 0).astype(v.dtype)
  return jnp.einsum("bhij,bhje->bhie", scores, v)


def cycles(core: Core, f: Callable[..., Any], *args: Any) -> tuple[float, int]:
  """Of all programs that multiply, together, and what they spill."""
  total, spills = 0.0, 0
  for program in schedule.compile_for(core, f, *args):
    run = simulate(program)
    if run.unknown:
      raise RuntimeError(f"{run.unknown} branches or waits are not understood")
    total, spills = total + run.cycles, spills + run.spills
  return total, spills


def rows_of(chip_name: str, kind: str) -> Iterator[Row]:
  """`kind` is the decay: by head or by token."""
  case, core = f"{chip_name} {kind}", CORES[chip_name]
  figure = lambda metric, value, target=None: Row.of(
    case, metric, [value], target=target, better="lower"
  )
  targets = TARGETS.get(case, (None, None))
  by_token = kind == "by token"
  for tokens in LENGTHS:
    args = inputs(tokens, by_token)
    if not by_token:
      pairs, _ = cycles(core, quadratic, *args)
      yield figure(f"quadratic, {tokens} tokens", pairs / tokens)
    found, _ = cycles(core, functools.partial(ours, LONG.chunk), *args)
    yield figure(f"ours, {tokens} tokens", found / tokens)
  for chunk in CHUNKS:
    found, spills = cycles(core, functools.partial(ours, chunk), *args)
    floor = 2 * WIDTH * (chunk + WIDTH) / core.macs
    forward, gradient = targets if chunk == 256 else (None, None)
    yield figure(f"ours, chunks of {chunk}", found / tokens, forward)
    yield Row.of(case, f"of peak, chunks of {chunk}", [floor * tokens / found])
    yield figure(f"spills, chunks of {chunk}", spills)
    both, spills = cycles(core, functools.partial(gradients, chunk), *args)
    yield figure(f"with gradient, chunks of {chunk}", both / tokens, gradient)
    yield figure(f"spills with gradient, chunks of {chunk}", spills)


CASES = {
  f"{chip} {kind}": functools.partial(rows_of, chip, kind)
  for chip in CORES
  for kind in ("by head", "by token")
}


def rows(options: Options) -> Iterator[Row]:
  """`--quick`: v5e, a decay by head."""
  names = options.select(CASES)
  if importlib.util.find_spec("libtpu") is None:
    print("no libtpu: pip install 'adaptivejax[aot-tpu]'", file=sys.stderr)
    return
  schedule.prepare()
  for name in names[:1] if options.quick else names:
    yield from CASES[name]()


if __name__ == "__main__":
  main(__doc__, rows)
