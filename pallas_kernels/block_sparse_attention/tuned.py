# SPDX-License-Identifier: Apache-2.0
"""How the TPU kernels cut their work: a rule over the figures of the chip.

Found on the compiler's schedules (`benchmarks.tpu_attention`):

* A step costs some 450 cycles however few its keys are: blocks are merged to
  512 keys.  Blocks of 128 then take 267 cycles for 128 queries on v5e, where
  256 keys take 341; 1024 take 258, but fill up more lists with copies.
* Query heads that share a list are stacked up to 1024 columns: keys are loaded
  once for all of them.
* Four steps of keys, one in use and three under way, hide the latency of
  memory: with two, the same blocks take 384 cycles.

There is no table of special shapes: for none has anything better been found.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_sparse_attention import cuts
from pallas_kernels.block_sparse_attention.cuts import Cut
from pallas_kernels.block_sparse_attention.plan import MARKS
from pallas_kernels.block_sparse_attention.types import BlockLists, Marks

Shaped = jax.Array | jax.ShapeDtypeStruct
DTYPES = (jnp.bfloat16, jnp.float32)
MOST_BLOCKS = 1 << 16
KEYS = 512
COLUMNS = 1024
MOST_MERGED = 8
DEPTH = 4
LANES = 128
MARGIN = 4 << 20
"""Bytes of VMEM left to what the compiler keeps for itself, and a quarter."""


def chip() -> pltpu.TpuInfo:
  """The chip compiled for; where that is unknown, one of little VMEM."""
  try:
    return pltpu.get_tpu_info()
  except ValueError:  # no TPU here: an export, or the interpreter
    return pltpu.get_tpu_info_for_chip(pltpu.ChipVersion.TPU_V5P, 1)


def check(q: Shaped, k: Shaped, v: Shaped, lists: BlockLists) -> None:
  """Raises a ValueError for dtypes and blocks that the kernels do not take."""
  dtypes = {x.dtype for x in (q, k, v)}
  if len(dtypes) > 1 or q.dtype not in DTYPES:
    raise ValueError(
      f"queries, keys and values must all be bfloat16 or float32, not"
      f" {q.dtype}, {k.dtype} and {v.dtype}: cast them"
    )
  rows = 32 // q.dtype.itemsize
  if lists.block_q % rows or lists.block_kv % rows:
    raise ValueError(
      f"{lists.block_q=} and {lists.block_kv=} must be multiples of {rows}, the"
      f" rows of a register of {q.dtype}"
    )
  if -(-k.shape[2] // lists.block_kv) > MOST_BLOCKS:
    raise ValueError(
      f"{k.shape[2]} keys are more than {MOST_BLOCKS} blocks of"
      f" {lists.block_kv}: use larger blocks"
    )


def forward_cut(
  q: Shaped,
  k: Shaped,
  v: Shaped,
  lists: BlockLists,
  marks: Marks,
  *,
  mass: bool = False,
  info: pltpu.TpuInfo | None = None,
) -> Cut:
  """Cuts a forward call; raises a ValueError where it does not fit."""
  info = info or chip()
  how = _tiles(q, k, v, lists, marks)
  cut = Cut(
    **how, parts=cuts.parts(how["lists"], how["merge"], how["lists"][1])
  )
  for name, size in zip(("tiles", "heads", "batch"), cut.part[::-1]):
    if info.num_cores > 1 and size % info.num_cores == 0:
      cut = dataclasses.replace(cut, cores=info.num_cores, split=name)
      break
  need = _shared_bytes(cut, q.dtype.itemsize)
  if mass:
    need += 2 * 4 * cut.columns * (cut.words * 2 + MARKS)
  return dataclasses.replace(cut, vmem_limit_bytes=_limit(need, info))


def backward_cut(
  q: Shaped,
  k: Shaped,
  v: Shaped,
  lists: BlockLists,
  marks: Marks,
  *,
  info: pltpu.TpuInfo | None = None,
) -> tuple[Cut, int]:
  """Cuts a backward call; and the key blocks whose gradients fit in VMEM.

  Raises a ValueError where it does not fit.
  """
  info = info or chip()
  how = _tiles(q, k, v, lists, marks)
  key_heads = how["shape"][2]
  cut = Cut(**how, parts=cuts.parts(how["lists"], how["merge"], key_heads))
  batch, heads, _ = cut.part
  if info.num_cores > 1 and heads % (info.num_cores * cut.per_key_head) == 0:
    cut = dataclasses.replace(cut, cores=info.num_cores, split="heads")
  elif info.num_cores > 1 and batch % info.num_cores == 0:
    cut = dataclasses.replace(cut, cores=info.num_cores, split="batch")
  *_, width, value_width = cut.shape
  size, lanes = q.dtype.itemsize, _lanes(width) + _lanes(value_width)
  fixed = _shared_bytes(cut, size)
  fixed += cut.columns * lanes * (4 + 4 * size)
  a_key = lanes * (4 + 2 * size)
  if marks.kv_bias is not None:
    a_key += 4 * LANES + 2 * 4 * MARKS
  room = (info.vmem_capacity_bytes - MARGIN) * 4 // 5 - fixed
  most = room // (a_key * cut.block_kv)
  if most < 1:
    raise ValueError(
      f"a step of {cut.columns} queries x {cut.keys} keys and the gradients of"
      f" a key block do not fit in VMEM: use smaller blocks"
    )
  chunks = -(-cut.blocks // most)
  blocks = -(-cut.blocks // chunks)
  need = fixed + blocks * cut.block_kv * a_key
  return dataclasses.replace(cut, vmem_limit_bytes=_limit(need, info)), blocks


def _tiles(
  q: Shaped, k: Shaped, v: Shaped, lists: BlockLists, marks: Marks
) -> dict[str, Any]:
  """What both have in common."""
  batch, heads, queries, width = q.shape
  key_heads, keys, value_width = v.shape[1:]
  shape = batch, heads, key_heads, queries, keys, width, value_width
  rows = cuts.list_shape(shape, lists, marks)
  sharing = heads // max(rows[1], key_heads)
  fits = lambda n: sharing % n == 0 and n * lists.block_q <= COLUMNS
  stack = max([n for n in range(1, sharing + 1) if fits(n)], default=1)
  merge = 1
  while (
    2 * merge * lists.block_kv <= KEYS
    and merge < MOST_MERGED
    and merge < rows[3]
  ):
    merge *= 2
  return {
    "shape": shape,
    "lists": rows,
    "block_q": lists.block_q,
    "block_kv": lists.block_kv,
    "stack": stack,
    "merge": merge,
    "depth": DEPTH,
    "piece": COLUMNS // 2,
  }


def _shared_bytes(cut: Cut, itemsize: int) -> int:
  """VMEM of what both kernels hold."""
  *_, width, value_width = cut.shape
  lanes = _lanes(width) + _lanes(value_width)
  keys = cut.depth * cut.keys * (lanes * itemsize + 4 * MARKS)
  columns = cut.columns * (lanes * (3 * itemsize + 4) + 4 * 8 * MARKS)
  scores = 4 * 4 * cut.columns * cut.keys
  return keys + columns + scores


def _lanes(width: int) -> int:
  """Numbers that a row takes in memory."""
  return -(-width // LANES) * LANES


def _limit(need: int, info: pltpu.TpuInfo) -> int:
  """What the compiler may use for `need` bytes."""
  limit = need + need // 4 + MARGIN
  if limit > info.vmem_capacity_bytes:
    raise ValueError(
      f"{need} bytes do not fit in {info.vmem_capacity_bytes} of VMEM: use"
      f" smaller blocks of queries or keys"
    )
  return limit
