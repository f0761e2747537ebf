# SPDX-License-Identifier: Apache-2.0
"""How a call is cut: all that is static about it.

Scalar memory, which holds the lists of `plan`, is 1 MiB on every chip: lists
that are longer are cut into parts, by batch and by heads, each of which is a
call.

Axes: as in `types`; M work heads, each a stack of H / M query heads that share
list and keys; N columns, the queries of a stack.
"""

import dataclasses
import math
from typing import Any

from pallas_kernels.block_sparse_attention.types import BlockLists, Marks

MOST_WORDS = 250_000
"""32-bit words of lists that fit the scalar memory, 1 MiB on every chip."""


@dataclasses.dataclass(frozen=True)
class Cut:
  """The static sizes of a call, and how its work is cut.

  Attributes:
    shape: (B, H, G, T, S, D, E), as the arrays are.
    lists: (batch, heads, Q, C) of the rows, after broadcasting to the marks.
    block_q, block_kv: of the lists.
    stack: query heads of a work head.
    merge: blocks that a step looks at, a power of two.
    depth: steps whose keys are under way or in use, a power of two.
    piece: columns computed together.
    parts: calls, over the batch and over the heads.
    cores: TensorCores that share the work, by `split`: tiles, heads or batch.
    vmem_limit_bytes: what the compiler may use.
  """

  shape: tuple[int, ...]
  lists: tuple[int, int, int, int]
  block_q: int
  block_kv: int
  stack: int = 1
  merge: int = 1
  depth: int = 4
  piece: int = 512
  parts: tuple[int, int] = (1, 1)
  cores: int = 1
  split: str = "tiles"
  vmem_limit_bytes: int | None = None

  @property
  def heads(self) -> int:
    """Work heads, M."""
    return self.shape[1] // self.stack

  @property
  def columns(self) -> int:
    return self.stack * self.block_q

  @property
  def keys(self) -> int:
    """Keys of a step."""
    return self.merge * self.block_kv

  @property
  def tiles(self) -> int:
    return self.lists[2]

  @property
  def blocks(self) -> int:
    return -(-self.shape[4] // self.block_kv)

  @property
  def words(self) -> int:
    """32-bit words of a row."""
    return row_words(self.lists[3], self.merge)

  @property
  def part(self) -> tuple[int, int, int]:
    """Batch, work heads and tiles of a part."""
    over_batch, over_heads = self.parts
    return self.shape[0] // over_batch, self.heads // over_heads, self.tiles

  @property
  def part_rows(self) -> tuple[int, int, int]:
    """Batch, heads and tiles of the rows of a part."""
    batch, heads, tiles, _ = self.lists
    return batch // self.parts[0], heads // self.parts[1], tiles

  @property
  def extent(self) -> tuple[int, int, int]:
    """Batch, work heads and tiles of a core."""
    batch, heads, tiles = self.part
    cores = lambda name: self.cores if name == self.split else 1
    batch, heads = batch // cores("batch"), heads // cores("heads")
    return batch, heads, tiles // cores("tiles")

  def place(self, core: Any, b: Any, m: Any, t: Any) -> tuple[Any, Any, Any]:
    """Batch, work head and tile in the part, of those in the core."""
    batch, heads, _ = self.extent
    if self.split == "tiles":  # in turns, for later tiles see more
      return b, m, t * self.cores + core
    if self.split == "heads":
      return b, m + core * heads, t
    return b + core * batch, m, t

  @property
  def per_key_head(self) -> int:
    """Work heads that share their keys."""
    return self.heads // self.shape[2]

  @property
  def per_list(self) -> int:
    """Work heads that share their lists."""
    return self.heads // self.lists[1]


def row_words(capacity: int, merge: int) -> int:
  """32-bit words of a row: its header, and entries for whole steps."""
  return 1 + math.ceil(math.ceil(capacity / merge) * merge / 2)


def parts(lists: tuple[int, int, int, int], merge: int, heads: int):
  """The fewest parts, over batch and `heads`, whose lists fit.

  Args:
    lists: (batch, heads, Q, C) of the rows.
    merge: blocks of a step.
    heads: what the number of parts over heads must divide.

  Raises:
    ValueError: those of one head are too long.
  """
  batch, list_heads, tiles, capacity = lists
  words = tiles * row_words(capacity, merge)
  divisors = lambda n: [d for d in range(1, n + 1) if n % d == 0]
  by_heads = divisors(math.gcd(list_heads, heads))
  for over_batch in divisors(batch):
    for over_heads in by_heads:
      rows = (batch // over_batch) * (list_heads // over_heads)
      if rows * words <= MOST_WORDS:
        return over_batch, over_heads
  least = words * list_heads // by_heads[-1]
  raise ValueError(
    f"lists of {tiles} tiles x {capacity} entries need {least} words of scalar"
    f" memory for a head, more than {MOST_WORDS}: use larger blocks, lists of"
    f" lower capacity, or call for parts of the queries"
  )


def list_shape(
  shape: tuple[int, ...], lists: BlockLists, marks: Marks
) -> tuple[int, int, int, int]:
  """The shape of the rows: as `lists`, and as the marks that decide."""
  batch, heads, tiles, capacity = lists.index.shape
  told = (marks.q_pos, marks.kv_pos, marks.q_segment)
  if any(mark is not None and len(mark) > 1 for mark in told):
    batch = shape[0]
  if marks.kv_pos is not None:
    heads = max(heads, marks.kv_pos.shape[1])
  return batch, heads, tiles, capacity
