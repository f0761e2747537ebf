# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on TPU: cycles of our kernels, without a TPU.

Read from the schedules of the TPU compiler (`benchmarks.tpu_schedule`); needs
libtpu, `pip install 'adaptivejax[aot-tpu]'`.  Figures are for one head of the
shapes of `pallas_kernels.block_sparse_attention.specs`, in bf16, on one core:
thousands of cycles of the whole kernel, or cycles for each 128 x 128 pairs that
are listed.  Sorting the lists is XLA's and not counted.  `backward` is all
gradients, in one kernel.  `spills` are vector registers put away in the main
block.  `long` is 131,072 tokens and eight heads: bundles of the schedule, for
it compiles.

`splash` are kept figures, of the compiler of jax 0.10.2 and the best blocks
found: jax.experimental.pallas.ops.tpu.splash_attention for `dense` and the
splash attention of tokamax 0.0.12, which is ahead of it, for the others.

    make aot-tpu
    python -m benchmarks.tpu_attention --cases 'v5e *' --json out.json
"""

import functools
import importlib.util
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from adaptivejax.training.tpu_schedule import CORES, Core
from benchmarks import tpu_schedule as schedule
from benchmarks.harness import Options, Row, main
from benchmarks.tpu_cycles import figure, on_host
from benchmarks.tpu_cycles import spec as array
from benchmarks.tpu_simulator import Run, simulate
from pallas_kernels.block_sparse_attention import (
  plan,
  specs,
  tpu,
  tpu_backward,
  tuned,
)
from pallas_kernels.block_sparse_attention.cuts import Cut
from pallas_kernels.block_sparse_attention.specs import Spec
from pallas_kernels.block_sparse_attention.types import (
  UNMARKED,
  BlockLists,
  Rule,
)

SPECS = (specs.COARSE, specs.FINE, specs.SHARED, specs.DENSE)
TARGETS = {  # thousand cycles, or cycles for 128 x 128
  ("v5e", "coarse", "forward"): 43.0,
  ("v6e", "coarse", "forward"): 32.5,
  ("v5e", "dense", "forward"): 62.682,
  ("v6e", "dense", "forward"): 42.227,
  ("v5e", "coarse", "backward"): 88.0,
  ("v6e", "coarse", "backward"): 56.0,
  ("v5e", "fine", "forward, each"): 320,
  ("v6e", "fine", "forward, each"): 340,
  ("v5e", "shared", "forward, each"): 150,
  ("v6e", "shared", "forward, each"): 120,
}
SPLASH = {  # thousand cycles: forward, and backward without the sum of dq
  ("v5e", "coarse"): (46.085, 87.533),
  ("v5p", "coarse"): (46.731, None),
  ("v6e", "coarse"): (34.711, 55.622),
  ("v5e", "dense"): (62.682, 119.087),
  ("v5p", "dense"): (70.914, None),
  ("v6e", "dense"): (42.227, 69.313),
}


def compiled(
  core: Core, spec: Spec, backward: bool
) -> tuple[schedule.Program, Cut]:
  """The only kernel of a call, and how it is cut."""
  q = array(1, spec.heads, spec.tokens, spec.width)
  k = array(1, spec.key_heads, spec.tokens, spec.width)
  lse = array(*q.shape[:3], dtype=jnp.float32)
  lists, rule = on_host(spec.lists), spec.rule
  if backward:
    cut, _ = tuned.backward_cut(q, k, k, lists, UNMARKED, info=core.info)
    f = lambda q, k, v, lists, *rest: tpu_backward.backward(
      q, k, v, lists, UNMARKED, rule, *rest
    )
    args = q, lse, q, lse
  else:
    cut = tuned.forward_cut(q, k, k, lists, UNMARKED, info=core.info)
    f = lambda q, k, v, lists: tpu.forward(q, k, v, lists, UNMARKED, rule)
    args = ()
  like = jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), lists)
  (program,) = schedule.compile_for(core, f, q, k, k, like, *args)
  return program, cut


def run(core: Core, spec: Spec, backward: bool) -> tuple[Run, int]:
  """The simulation of a kernel on a core, and the cores that share the work."""
  program, cut = compiled(core, spec, backward)
  words, starts = on_host(scalars, cut, spec.lists(), spec.rule)
  result = simulate(program, [words, starts])
  if result.unknown:
    raise RuntimeError(f"{result.unknown} branches or waits are not understood")
  return result, cut.cores


def scalars(
  cut: Cut, lists: BlockLists, rule: Rule
) -> tuple[jax.Array, jax.Array]:
  """What the kernel of the only part reads into scalar memory."""
  lists = jax.tree.map(jnp.asarray, lists)
  marks = plan.queries(cut, UNMARKED, rule), plan.keys(cut, UNMARKED)
  words, starts = plan.in_parts(cut, plan.rows(cut, lists, *marks).words)
  return words[0], starts[0]


def rows_of(chip_name: str, spec: Spec) -> Iterator[Row]:
  """Forward and backward."""
  case, core = f"{chip_name} {spec.name}", CORES[chip_name]
  splash = SPLASH.get((chip_name, spec.name), (None, None))
  for kind, other in zip(("forward", "backward"), splash):
    result, cores = run(core, spec, kind == "backward")
    cycles = result.cycles / spec.heads * cores
    target = lambda metric: TARGETS.get((chip_name, spec.name, metric))
    yield figure(case, kind, cycles / 1e3, target(kind))
    each = f"{kind}, each"
    yield figure(case, each, cycles / spec.squares, target(each))
    if other is not None:
      yield figure(case, f"{kind}, splash", other)
    yield figure(case, f"{kind}, spills", result.spills)


def long_rows(chip_name: str) -> Iterator[Row]:
  """That it compiles; to simulate it would take hours."""
  case, core = f"{chip_name} long", CORES[chip_name]
  for kind in ("forward", "backward"):
    program, _ = compiled(core, specs.LONG, kind == "backward")
    yield Row.of(case, f"{kind}, bundles", [len(program.code)])


CASES = {
  f"{chip} {spec.name}": functools.partial(rows_of, chip, spec)
  for chip in CORES
  for spec in SPECS
} | {f"{chip} long": functools.partial(long_rows, chip) for chip in CORES}


def rows(options: Options) -> Iterator[Row]:
  """`--quick`: blocks of 512 on v5e."""
  names = options.select(CASES)
  if importlib.util.find_spec("libtpu") is None:
    print("no libtpu: pip install 'adaptivejax[aot-tpu]'", file=sys.stderr)
    return
  schedule.prepare()
  for name in names[:1] if options.quick else names:
    yield from CASES[name]()


if __name__ == "__main__":
  main(__doc__, rows)
