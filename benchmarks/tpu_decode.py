# SPDX-License-Identifier: Apache-2.0
"""Sparse decode attention on TPU: cycles of our kernel, without a TPU.

Read from the schedules of the TPU compiler, see `benchmarks.tpu_schedule`; as
there, cycles compare programs and are no times.  The shape is `SERVING` of
`pallas_kernels.sparse_decode_attention`, in bf16: 8 sequences of 4096 keys, 32
query heads, 8 key heads, head width 128.  `of floor` is what reading the listed
keys and values would take at the full bandwidth of HBM (v5p: two cores, half of
the bandwidth each) to what the kernel takes; 1 is the best there is.  Only the
kernel counts, not the gathers of marks by XLA before it.  Lists name a quarter
of the keys.

`cache` and `int8` read all keys; `shared` lists pages of 16 that all heads
share, `heads` pages of 16 or 32 for each key head; `int8` lists pages of 32
that all heads share.  Dense paged attention of jax (ragged_paged_attention,
its best blocks) takes 252 (v5e), 192 (v6e) and 199 (v5p, on one core) thousand
cycles for `cache`.

    python -m benchmarks.tpu_decode --cases 'v5e *'
"""

import functools
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.training.tpu_schedule import CORES
from benchmarks import tpu_schedule as schedule
from benchmarks.harness import Options, Row, main
from benchmarks.tpu_simulator import simulate
from pallas_kernels.block_sparse_attention.types import CAUSAL, UNMARKED
from pallas_kernels.sparse_decode_attention import Units, tpu, tuned
from pallas_kernels.sparse_decode_attention.specs import SERVING

TARGETS = {"v5e cache": 0.95, "v5p cache": 0.95, "v6e cache": 0.95}
KINDS = {  # lists, slots of a unit, listed slots, dtype
  "cache": (0, 0, SERVING.slots, jnp.bfloat16),
  "shared": (1, 16, SERVING.slots // 4, jnp.bfloat16),
  "heads 16": (SERVING.key_heads, 16, SERVING.slots // 4, jnp.bfloat16),
  "heads 32": (SERVING.key_heads, 32, SERVING.slots // 4, jnp.bfloat16),
  "int8": (1, 32, SERVING.slots, jnp.int8),
}


def scalars(cut: tuned.Blocks, pieces: int, lists: int) -> list[np.ndarray]:
  """Of full lists, in the order in which the kernel takes them."""
  items = SERVING.batch * SERVING.key_heads // cut.heads
  each = cut.heads if lists > 1 else 1
  rounds = -(-pieces * cut.piece // cut.slots)
  whole = np.full(items, pieces, np.int32)
  start = np.zeros(items * each * rounds * (cut.slots // cut.piece), np.int32)
  clean = np.ones(items * rounds, np.int32)
  return [whole, np.repeat(whole, each), clean, start]


def decode_rows(chip_name: str, kind: str) -> Iterator[Row]:
  case, core, s = f"{chip_name} {kind}", CORES[chip_name], SERVING
  lists, unit, listed, dtype = KINDS[kind]
  spec: Any = lambda *shape, of=dtype: jax.ShapeDtypeStruct(shape, of)
  q = spec(s.batch, s.heads, 1, s.width, of=jnp.bfloat16)
  k = spec(s.batch, s.key_heads, s.slots, s.width)
  scale = spec(*k.shape[:3], of=jnp.float32) if dtype == jnp.int8 else None
  units = None
  if lists:
    index = spec(s.batch, lists, listed // unit, of=jnp.int32)
    units = Units(index, spec(s.batch, lists, of=jnp.int32), unit)

  def f(q, k, v, units, scale):
    more = {"page_table": None, "k_scale": scale, "v_scale": scale}
    got = tpu.forward(q, k, v, units, UNMARKED, CAUSAL, mass=False, **more)
    return got.out, got.lse

  (program,) = schedule.compile_for(core, f, q, k, k, units, scale)
  cut = tuned.blocks(q, k, k, units, None, core.info)
  assert cut is not None
  run = simulate(program, scalars(cut, listed // cut.piece, lists))
  if run.unknown:
    raise RuntimeError(f"{run.unknown} branches or waits are not understood")
  nbytes = s.bytes(listed, jnp.dtype(dtype).itemsize)
  floor = nbytes / core.bandwidth / cut.cores
  yield Row.of(case, "thousand cycles", [run.cycles / 1e3], better="lower")
  target = TARGETS.get(case)
  yield Row.of(case, "of floor", [floor / run.cycles], target=target)
  yield Row.of(case, "cores", [cut.cores], target=core.cores)
  yield Row.of(case, "spills", [run.spills], better="lower")


CASES = {
  f"{chip} {kind}": functools.partial(decode_rows, chip, kind)
  for chip in CORES
  for kind in KINDS
}


def rows(options: Options) -> Iterator[Row]:
  """`--quick`: the whole cache on v5e."""
  names = options.select(CASES)
  if importlib.util.find_spec("libtpu") is None:
    print("no libtpu: pip install 'adaptivejax[aot-tpu]'", file=sys.stderr)
    return
  schedule.prepare()
  for name in names[:1] if options.quick else names:
    yield from CASES[name]()


if __name__ == "__main__":
  main(__doc__, rows)
