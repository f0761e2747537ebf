# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on an H100, read from its machine code; needs no GPU.

As `gpu_static` does: the kernel is compiled by the real compilers (XLA, ptxas),
and of each of its two loops, over blocks without a mask and with one, for one
warp group and one step,

    tensor = multiply-adds / 2048,   issue = instructions of the longest way,

both in cycles.  issue / tensor above 1 means that issuing binds.  For heads 128
wide, the goal without a mask is not to lose what is reached (the dense Mosaic
GPU attention of tokamax 0.0.17 has 0.45), and with one it is what tokamax has,
0.68.  These figures say what binds, not the time.

    python -m benchmarks.gpu_attention --json out.json
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu_static
from benchmarks.gpu_static import MACS_PER_CYCLE, Code, Instruction
from benchmarks.harness import Options, Row, main
from pallas_kernels.block_sparse_attention import BlockLists, Marks, Rule

LOOPS = ("unmasked", "masked")
GOALS = {
  "registers": 168,
  "bytes spilled": 0,
  "wgmma serialized, warnings": 0,
  "unmasked step: issue / tensor": 0.47,
  "masked step: issue / tensor": 0.68,
}


@dataclasses.dataclass(frozen=True)
class Call:
  """8 query heads and 2 key heads over 4096 tokens, blocks of 128 keys.

  Attributes:
    width: of heads.
    marked: with positions, segments, biases, sinks, chosen rows, a window and a
      softcap, all at once.
  """

  width: int
  marked: bool = False

  def arrays(self) -> tuple[Any, ...]:
    """q, k, v, lists and marks."""
    like: Any = jax.ShapeDtypeStruct
    tokens, tiles, capacity = 4096, 32, 16
    i32, f32 = jnp.int32, jnp.float32
    q, k = (like((1, n, tokens, self.width), jnp.bfloat16) for n in (8, 2))
    index, count = like((1, 1, tiles, capacity), i32), like((1, 1, tiles), i32)
    if not self.marked:
      return q, k, k, BlockLists(index, count), Marks()
    rows = like((*index.shape, 128), jnp.bool_)
    marks = Marks(
      q_pos=like((1, tokens), i32),
      kv_pos=like((1, 1, tokens), i32),
      q_segment=like((1, tokens), i32),
      kv_segment=like((1, tokens), i32),
      kv_bias=like((1, 1, tokens), f32),
      sinks=like((8,), f32),
    )
    return q, k, k, BlockLists(index, count, rows), marks

  @property
  def rule(self) -> Rule:
    return Rule(window=512, softcap=30.0) if self.marked else Rule()


CALLS = {
  "128 wide": Call(128),
  "64 wide": Call(64),
  "128 wide, all marks": Call(128, marked=True),
}


def inner_loops(code: list[Instruction]) -> list[list[Instruction]]:
  """The innermost loops that multiply, in order."""
  spans = [
    (x.to, i + 1)
    for i, x in enumerate(code)
    if x.text.startswith("@") and x.to is not None and x.to <= i
  ]
  spans = [(a, b) for a, b in spans if any(x.macs for x in code[a:b])]
  inside = lambda s, o: s != o and s[0] <= o[0] and o[1] <= s[1]
  spans = [s for s in spans if not any(inside(s, o) for o in spans)]
  local = lambda x, a: None if x.to is None else x.to - a
  return [
    [dataclasses.replace(x, to=local(x, a)) for x in code[a:b]]
    for a, b in sorted(spans)
  ]


def figures(code: Code) -> dict[str, float]:
  """The figures of the kernel."""
  every = gpu_static.parse(code.sass)
  found: dict[str, float] = {
    "registers": code.registers,
    "bytes spilled": code.spills,
    "shared memory, bytes": code.shared_memory,
    "wgmma serialized, warnings": code.serialized,
    "instructions in all": len(every),
  }
  for name, loop in zip(LOOPS, inner_loops(every), strict=True):
    tensor = sum(x.macs for x in loop) / MACS_PER_CYCLE
    issue = gpu_static.longest_way(loop)
    found |= {
      f"{name} step: tensor": tensor,
      f"{name} step: issue": issue,
      f"{name} step: issue / tensor": issue / tensor,
    }
  return found


def rows(options: Options) -> Iterator[Row]:
  if reason := gpu_static.missing():
    print(f"gpu_attention: nothing compiled: {reason}", file=sys.stderr)
    return
  from pallas_kernels.block_sparse_attention import gpu

  calls = dict(list(CALLS.items())[:1]) if options.quick else CALLS
  for name in options.select(calls):
    call = calls[name]
    run = lambda *args, call=call: gpu.forward(*args, rule=call.rule)
    goals = GOALS if call == CALLS["128 wide"] else {}
    found = figures(gpu_static.compiled(run, *call.arrays()))
    for metric, value in found.items():
      goal = goals.get(metric)
      yield Row.of(name, metric, [value], target=goal, better="lower")


if __name__ == "__main__":
  main(__doc__, rows)
