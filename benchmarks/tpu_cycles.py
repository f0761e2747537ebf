# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul on TPU: cycles of our kernels and of others, without a TPU.

Read from the schedules of the TPU compiler (`benchmarks.tpu_schedule`); needs
libtpu, `pip install 'adaptivejax[aot-tpu]'`.  Figures are thousands of cycles
of a whole kernel for the shape `EXPERTS` of `pallas_kernels.grouped_matmul`, in
bf16, on one core; work lists are not counted, for anyone.  `megablox` is
jax.experimental.pallas.ops.tpu.megablox with the best tiles found, `tokamax` is
its kernel for TPUs with the same tiles, where it is installed (its typeguard is
not tyro's: in an environment of its own), `ragged_dot` is lax.ragged_dot,
`dense` is XLA's matmul of as many rows.  `skewed` groups have sizes drawn from
Dirichlet(1); `rows` picks them from half as many tokens; `dw` is the gradient
of the weights.  `spills` are vector registers put away in the main block.

    make aot-tpu
    python -m benchmarks.tpu_cycles --cases 'v5e *' --json out.json
"""

import dataclasses
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.training.tpu_schedule import CORES, Core
from benchmarks import tpu_schedule as schedule
from benchmarks.harness import Options, Row, main
from benchmarks.tpu_simulator import Run, simulate
from pallas_kernels.grouped_matmul import ops, tuned
from pallas_kernels.grouped_matmul.specs import EXPERTS
from pallas_kernels.grouped_matmul.work import make_work

TARGETS = {  # thousand cycles
  "v5e balanced": 556,
  "v5e skewed": 650,
  "v6e balanced": 188,
  "v6e skewed": 230,
}
MEGABLOX = {  # the best tiles found, rows x features x columns
  ("v5e", "balanced"): (512, 1024, 1024),
  ("v5e", "skewed"): (256, 1024, 2048),
  ("v5e", "dw balanced"): (1024, 1024, 1024),
  ("v5e", "dw skewed"): (256, 1024, 1024),
  ("v5p", "balanced"): (512, 1024, 1024),
  ("v5p", "skewed"): (256, 1024, 2048),
  ("v5p", "dw balanced"): (512, 1024, 1024),
  ("v5p", "dw skewed"): (256, 1024, 1024),
  ("v6e", "balanced"): (1024, 1024, 2048),
  ("v6e", "skewed"): (256, 1024, 4096),
  ("v6e", "dw balanced"): (1024, 1024, 2048),
  ("v6e", "dw skewed"): (512, 1024, 2048),
}
RAGGED_HEIGHT = 128
"""Rows of a tile of lax.ragged_dot."""
TO_PICK = {"v5e": 1.05, "v6e": 1.05}
BF16 = jnp.bfloat16


def spec(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


M, K, N, E = EXPERTS.rows, EXPERTS.features, EXPERTS.columns, EXPERTS.groups
X, W, DY = spec(M, K), spec(E, K, N), spec(M, N)
SIZES = spec(E, dtype=jnp.int32)
BYTES = 2 * (M * K + E * K * N + M * N)
"""What every kernel must move."""


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A compiled program, and the scalars it reads for groups of given sizes."""

  programs: list[schedule.Program]
  scalars: Callable[[np.ndarray], Sequence[Any]]

  def run(self, sizes: np.ndarray) -> Run:
    """The simulation of the only program that multiplies."""
    (program,) = self.programs
    run = simulate(program, self.scalars(sizes))
    if run.unknown:
      raise RuntimeError(f"{run.unknown} branches or waits are not understood")
    return run


def on_host(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  """`f(*args)` on the CPU, as numpy arrays."""
  with jax.default_device(jax.devices("cpu")[0]):
    return jax.tree.map(np.asarray, f(*args, **kwargs))


def work(sizes: np.ndarray, height: int, **how: Any) -> list[np.ndarray]:
  return list(on_host(make_work, jnp.asarray(sizes), M, height, **how))


def known(tiles: tuned.Tiles | None) -> tuned.Tiles:
  """There are tiles for this shape on every chip."""
  assert tiles is not None
  return tiles


@functools.cache
def ours(core: Core, kind: str) -> Kernel:
  """`map`, `rows` or `dw`."""
  shape = M, K, N, 2
  if kind == "dw":
    tiles = known(tuned.sums_tiles(*shape, info=core.info))
    f = lambda x, dy, sizes: ops.sums(x, dy, sizes)
    programs = schedule.compile_for(core, f, X, DY, SIZES)
    return Kernel(programs, lambda s: work(s, tiles.height, sums=True))
  tokens = EXPERTS.tokens if kind == "rows" else 0
  tiles = known(tuned.matmul_tiles(*shape, gathered=tokens, info=core.info))
  if not tokens:
    programs = schedule.compile_for(core, ops.grouped_matmul, X, W, SIZES)
    return Kernel(programs, lambda s: work(s, tiles.height, sums=False))
  f = lambda x, w, sizes, rows: ops.grouped_matmul(x, w, sizes, rows=rows)
  rows = spec(M, dtype=jnp.int32)
  programs = schedule.compile_for(core, f, spec(tokens, K), W, SIZES, rows)
  return Kernel(
    programs,
    lambda s: work(s, tiles.height, sums=False) + [EXPERTS.names()],
  )


def megablox_work(sizes: np.ndarray, height: int, empty: bool) -> list[Any]:
  """The scalars of its kernels, and of those of lax.ragged_dot."""
  (offsets, groups, tiles), count = on_host(
    megablox().make_group_metadata,
    group_sizes=jnp.asarray(sizes),
    m=M,
    tm=height,
    start_group=jnp.array(0),
    num_nonzero_groups=E,
    visit_empty_groups=empty,
  )
  return [count, offsets, groups, tiles, np.zeros(1, np.int32)]


def megablox() -> Any:
  """Its module: the package has a function of the same name."""
  return importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")


@functools.cache
def theirs(chip_name: str, kind: str) -> Kernel:
  """The kernels of megablox."""
  core, tiles = CORES[chip_name], MEGABLOX[chip_name, kind]
  how = {"preferred_element_type": BF16, "tiling": tiles}
  sums = kind.startswith("dw")
  if sums:
    f = lambda x, dy, sizes: megablox().tgmm(x, dy, sizes, **how)
    args = spec(K, M), DY, SIZES
  else:
    f = lambda x, w, sizes: megablox().gmm(x, w, sizes, **how)
    args = X, W, SIZES
  programs = schedule.compile_for(core, f, *args)
  return Kernel(programs, lambda s: megablox_work(s, tiles[0], sums))


@functools.cache
def tokamax(chip_name: str, kind: str) -> Kernel:
  """That of tokamax, of the design of megablox, with the same scalars."""
  module = importlib.import_module(
    "tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel"
  )
  core, tiles = CORES[chip_name], MEGABLOX[chip_name, kind]
  how = {"precision": jax.lax.Precision.DEFAULT, "tiling": tiles}
  f = lambda x, w, sizes: module.gmm(x, w, sizes, out_dtype=BF16, **how)
  programs = schedule.compile_for(core, f, X, W, SIZES)
  return Kernel(programs, lambda s: megablox_work(s, tiles[0], False))


@functools.cache
def ragged(core: Core) -> Kernel:
  """lax.ragged_dot, a kernel of the compiler's own."""
  f = lambda x, w, sizes: jax.lax.ragged_dot(
    x, w, sizes, preferred_element_type=BF16
  )
  programs = schedule.compile_for(core, f, X, W, SIZES)

  def scalars(sizes):
    count, *lists, _ = megablox_work(sizes, RAGGED_HEIGHT, False)
    return [count, *lists, count]

  return Kernel(programs, scalars)


@functools.cache
def dense(core: Core) -> Kernel:
  """XLA's matmul."""
  programs = schedule.compile_for(core, jnp.matmul, X, spec(K, N))
  return Kernel(programs, lambda sizes: [])


def figure(
  case: str, metric: str, value: float, target: float | None = None
) -> Row:
  return Row.of(case, metric, [value], target=target, better="lower")


def forward_rows(chip_name: str, kind: str) -> Iterator[Row]:
  """All that can do it."""
  case, core = f"{chip_name} {kind}", CORES[chip_name]
  sizes = EXPERTS.sizes(kind == "balanced")
  run = ours(core, "map").run(sizes)
  yield figure(case, "ours", run.cycles / 1e3, TARGETS.get(case))
  yield figure(
    case, "megablox", theirs(chip_name, kind).run(sizes).cycles / 1e3
  )
  if importlib.util.find_spec("tokamax") is not None:
    other = tokamax(chip_name, kind).run(sizes)
    if other.hbm < BYTES / core.cores:
      print(f"{case}: tokamax's transfers are not understood", file=sys.stderr)
    else:
      yield figure(case, "tokamax", other.cycles / 1e3)
  yield figure(case, "ragged_dot", ragged(core).run(sizes).cycles / 1e3)
  yield figure(case, "dense", dense(core).run(sizes).cycles / 1e3)
  floor = M * K * N / core.macs / core.cores
  yield Row.of(case, "ours, of peak", [floor / run.cycles])
  yield figure(case, "ours, spills", run.spills)


def gather_rows(chip_name: str) -> Iterator[Row]:
  """Picking rows, against having them in order."""
  case, core = f"{chip_name} rows", CORES[chip_name]
  sizes = EXPERTS.sizes(True)
  run = ours(core, "rows").run(sizes)
  alone = ours(core, "map").run(sizes)
  yield figure(case, "ours", run.cycles / 1e3)
  ratio = run.cycles / alone.cycles
  yield figure(case, "ours, to matmul alone", ratio, TO_PICK.get(chip_name))
  yield figure(case, "ours, spills", run.spills)


def dw_rows(chip_name: str) -> Iterator[Row]:
  """The gradient of the weights, against that of megablox."""
  case, core = f"{chip_name} dw", CORES[chip_name]
  for kind in ("balanced", "skewed"):
    sizes = EXPERTS.sizes(kind == "balanced")
    run = ours(core, "dw").run(sizes)
    other = theirs(chip_name, f"dw {kind}").run(sizes).cycles / 1e3
    yield figure(case, f"ours, {kind}", run.cycles / 1e3, other)
    yield figure(case, f"megablox, {kind}", other)
  yield figure(case, "ours, spills", run.spills)


CASES = {
  f"{chip} {kind}": functools.partial(rows, chip, *args)
  for chip in CORES
  for kind, rows, args in (
    ("balanced", forward_rows, ("balanced",)),
    ("skewed", forward_rows, ("skewed",)),
    ("rows", gather_rows, ()),
    ("dw", dw_rows, ()),
  )
}


def rows(options: Options) -> Iterator[Row]:
  """`--quick`: balanced groups on v5e."""
  names = options.select(CASES)
  if importlib.util.find_spec("libtpu") is None:
    print("no libtpu: pip install 'adaptivejax[aot-tpu]'", file=sys.stderr)
    return
  schedule.prepare()
  if importlib.util.find_spec("tokamax") is None:
    print("no tokamax: not compared (pip install tokamax)", file=sys.stderr)
  for name in names[:1] if options.quick else names:
    yield from CASES[name]()


if __name__ == "__main__":
  main(__doc__, rows)
