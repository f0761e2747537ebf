# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul on an H100, read from its machine code; needs no GPU.

Each kernel is compiled for an H100 by the real compilers (XLA, ptxas) and its
machine code is read: registers, spills, shared memory, and the main loop, which
is the innermost one that multiplies.  Of one step of it, for one warp group,

    tensor = multiply-adds / 2048,   issue = instructions,

both in cycles: a multiprocessor does 2048 multiply-adds of 16-bit numbers in a
cycle, and each of its four schedulers issues one instruction of its warp of the
group.  issue / tensor must stay well below 1, or issuing binds.  It includes
its share of the warp group that only loads, if there is one.  A step that masks
(in dw, at both ends of a group) goes through shared memory and has a figure of
its own.  `jax` is `jax.experimental.pallas.ops.gpu`, in tiles of 128 x 128 by
one warp group, and masks one operand of dw where we mask both (NaN times 0 is
NaN); ours are 128 x 256 by two.  These figures say what binds, not the time: no
cache, no latency.

A case is KERNEL SHAPE: A has few large groups, B many small ones.

    python -m benchmarks.gpu_static --json out.json
    python -m benchmarks.gpu_static --cases 'ours*' '* A'
"""

import dataclasses
import functools
import importlib.util
import os
import re
import sys
import sysconfig
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptivejax.training.chips import H100
from benchmarks.harness import Options, Row, main

SMS = 132
MACS_PER_CYCLE = 2048  # of one multiprocessor, 16-bit operands


@dataclasses.dataclass(frozen=True)
class Shape:
  """M rows in E groups; w is [E, K, N]."""

  m: int
  k: int
  n: int
  e: int


SHAPES = {"A": Shape(8192, 1024, 4096, 8), "B": Shape(8192, 2048, 1024, 64)}
KINDS = ("forward", "transposed", "dw")


def ours(kind: str, *args: jax.Array) -> jax.Array:
  from pallas_kernels.grouped_matmul import gpu

  if kind == "dw":
    return gpu.grouped_matmul_dw(*args, num_sms=SMS)
  transpose = kind == "transposed"
  return gpu.grouped_matmul(*args, transpose_w=transpose, num_sms=SMS)


def theirs(kind: str, a: jax.Array, b: jax.Array, sizes: jax.Array):
  from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu
  from jax.experimental.pallas.ops.gpu import (
    transposed_ragged_dot_mgpu as other,
  )

  tile: dict[str, Any] = {
    "block_m": 128,
    "block_n": 128,
    "block_k": 64,
    "max_concurrent_steps": 4,
    "grid_block_n": 4,
  }
  if kind == "dw":  # it asks the first device how many multiprocessors it has
    device = types.SimpleNamespace(core_count=SMS)
    with mock.patch.object(jax, "devices", lambda: [device]):
      return other.transposed_ragged_dot(a, b, group_sizes=sizes, **tile)
  return ragged_dot_mgpu.ragged_dot(
    a, b, group_sizes=sizes, transpose_rhs=kind == "transposed", **tile
  )


def arrays(kind: str, shape: Shape) -> list[jax.ShapeDtypeStruct]:
  """What a kernel is given."""
  m, k, n, e = dataclasses.astuple(shape)
  shapes = {
    "forward": [(m, k), (e, k, n)],
    "transposed": [(m, n), (e, k, n)],
    "dw": [(m, k), (m, n)],
  }
  operands = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes[kind]]
  return [*operands, jax.ShapeDtypeStruct((e,), jnp.int32)]


@dataclasses.dataclass(frozen=True)
class Code:
  """What the compilers wrote about one kernel."""

  ptxas: str
  resources: str
  sass: str

  def _count(self, pattern: str) -> int:
    return sum(map(int, re.findall(pattern, self.ptxas)))

  @property
  def registers(self) -> int:
    """For each thread."""
    return self._count(r"Used (\d+) registers")

  @property
  def spills(self) -> int:
    """Bytes stored to and loaded from the stack, for each thread."""
    return self._count(r"(\d+) bytes spill")

  @property
  def serialized(self) -> int:
    """Warnings of ptxas that it had to serialize wgmma."""
    return len(re.findall(r"wgmma.*serializ", self.ptxas))

  @property
  def shared_memory(self) -> int:
    """Bytes of operands and results for each thread block."""
    return int(re.findall(r"smem_scratch_bytes=(\d+)", self.resources)[0])


def compiled(f: Callable[..., Any], *args: Any) -> Code:
  """Compiles `f`, which has one Mosaic GPU kernel, for an H100."""
  device = _device()
  sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
  with tempfile.TemporaryDirectory() as folder:
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    jax.jit(f, in_shardings=sharding).lower(*args).compile()

    def read(suffix):
      (file,) = Path(folder).glob(f"*{suffix}")
      return file.read_text(errors="replace").replace("\0", "")

    return Code(read(".ptxas"), read(".resources.txt"), read(".sass_ctrl"))


@functools.cache
def _device() -> Any:
  """An H100 that is not there."""
  cuda = next(_cuda())
  flags = f"--xla_gpu_cuda_data_dir={cuda} --xla_gpu_autotune_level=0"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
  os.environ["PATH"] = f"{cuda / 'bin'}:{os.environ['PATH']}"
  jax.config.update("jax_enable_compilation_cache", False)
  one = {"target_config": H100, "topology": "1x1x1"}
  return topologies.get_topology_desc("", platform="cuda", **one).devices[0]


def _cuda() -> Iterator[Path]:
  """Folders of pip's CUDA compilers, those with a disassembler too."""
  packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
  for tool in packages.glob("cu*/bin/nvdisasm"):
    if (tool.parent / "ptxas").exists():
      yield tool.parents[1]


def missing() -> str:
  """What to install to compile for a GPU; empty if nothing."""
  if jax.__version_info__ < (0, 12):
    return f"jax {jax.__version__} cannot compile it: it needs Python 3.12"
  plugin = importlib.util.find_spec("jax_cuda13_plugin")
  if plugin is None or next(_cuda(), None) is None:
    return "pip install '.[aot-gpu]' (5 GB), or `make aot-gpu`, first"
  return ""


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of machine code; `to`: the index that it may branch to."""

  text: str
  to: int | None = None

  @property
  def falls_through(self) -> bool:
    """Whether the next instruction may follow."""
    return not re.match(r"(BRA|EXIT|RET)\b", self.text)

  @property
  def macs(self) -> int:
    """Multiply-adds of a warp group."""
    if shape := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.text):
      return int(np.prod([int(size) for size in shape.groups()]))
    return 0


def parse(sass: str) -> list[Instruction]:
  """The instructions of a disassembly, labels resolved."""
  texts, labels = [], {}
  for line in sass.splitlines():
    if label := re.match(r"\s*(\.L_\w+):", line):
      labels[label[1]] = len(texts)
    elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;?\s*$", line):
      texts.append(code[1])
  branch = re.compile(r"BRA.*`\((\.L_\w+)\)")
  target = lambda text: (found := branch.search(text)) and labels[found[1]]
  return [Instruction(text, target(text)) for text in texts]


def main_loop(
  code: list[Instruction], has: Callable[[Instruction], Any]
) -> list[Instruction]:
  """The shortest loop with such an instruction; branches count from its start.

  A loop ends with a conditional branch back.  An unconditional one returns from
  a wait, whose code lies behind that of the kernel.
  """
  spans = [
    (x.to, i + 1)
    for i, x in enumerate(code)
    if x.text.startswith("@") and x.to is not None and x.to <= i
  ]
  spans = [(a, b) for a, b in spans if any(map(has, code[a:b]))]
  first, end = min(spans, key=lambda span: span[1] - span[0])
  local = lambda to: None if to is None else to - first
  return [dataclasses.replace(x, to=local(x.to)) for x in code[first:end]]


def longest_way(loop: list[Instruction], without: str = "$^") -> int:
  """Instructions of the longest way through, forward, without such ones."""
  most = {len(loop): 0}
  for i, x in reversed(list(enumerate(loop))):
    nexts = [i + 1] if x.falls_through else []
    nexts += [x.to] if x.to is not None and x.to > i else []
    ahead = [most[j] for j in nexts if j in most]
    if ahead and not re.search(without, x.text):
      most[i] = 1 + max(ahead)
  return most[0]


SHARED = r"\b(LDS|STS|LDSM|STSM)\b"


def figures(code: Code, multipliers: int, masks: bool) -> dict[str, float]:
  """The figures of a kernel with so many warp groups that multiply."""
  every = parse(code.sass)
  loop = main_loop(every, lambda x: x.macs)
  count = lambda loop, word: sum(bool(re.search(word, x.text)) for x in loop)
  tensor = sum(x.macs for x in loop) / MACS_PER_CYCLE
  loading = 0.0
  if multipliers > 1:
    loads = main_loop(every, lambda x: "UTMALDG" in x.text)
    loading = 2 * longest_way(loads) / count(loads, "UTMALDG")  # of 2 operands
  usual, most = longest_way(loop, SHARED), longest_way(loop)
  found = {
    "registers": code.registers,
    "bytes spilled": code.spills,
    "shared memory, bytes": code.shared_memory,
    "wgmma serialized, warnings": code.serialized,
    "instructions in all": len(every),
    "step: tensor": tensor,
    "step: issue": usual,
    "step: issue, of them wgmma": count(loop, "HGMMA"),
    "step: issue, of them waits for wgmma": count(loop, "WARPGROUP.DEPBAR"),
    "step: issue of the loading warp group": loading,
    "step: issue / tensor": (usual + loading / multipliers) / tensor,
  }
  if masks:
    share = (most + loading / multipliers) / tensor
    found |= {
      "masking step: issue": most,
      "masking step: issue / tensor": share,
    }
  return found


def rows(options: Options) -> Iterator[Row]:
  if reason := missing():
    print(f"gpu_static: nothing compiled: {reason}", file=sys.stderr)
    return
  names = {
    f"{who} {kind} {shape}": (who, kind, shape)
    for shape in SHAPES
    for kind in KINDS
    for who in ("jax", "ours")
  }
  if options.quick:
    names = {"ours forward A": names["ours forward A"]}
  bars: dict[tuple[str, str], dict[str, float]] = {}  # what jax reaches
  for name in options.select(names):
    who, kind, shape = names[name]
    run = functools.partial(ours if who == "ours" else theirs, kind)
    code = compiled(run, *arrays(kind, SHAPES[shape]))
    found = figures(code, 2 if who == "ours" else 1, masks=kind == "dw")
    bar = bars.setdefault((kind, shape), found if who == "jax" else {})
    targets = {
      "registers": 168,
      "bytes spilled": 0,
      "wgmma serialized, warnings": 0,
    }
    targets |= {key: x for key, x in bar.items() if key.endswith("/ tensor")}
    for metric, value in found.items():
      target = targets.get(metric) if who == "ours" else None
      yield Row.of(name, metric, [value], target=target, better="lower")


if __name__ == "__main__":
  main(__doc__, rows)
