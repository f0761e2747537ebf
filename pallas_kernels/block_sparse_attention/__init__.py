# SPDX-License-Identifier: Apache-2.0
"""Attention over lists of key blocks, whose contents are data."""

from pallas_kernels.block_sparse_attention import reference
from pallas_kernels.block_sparse_attention.merge import merge_lse
from pallas_kernels.block_sparse_attention.ops import (
  block_sparse_attention,
  block_sparse_gradient,
)
from pallas_kernels.block_sparse_attention.types import (
  Attended,
  BlockLists,
  Marks,
  Rule,
)

__all__ = [
  "Attended",
  "BlockLists",
  "Marks",
  "Rule",
  "block_sparse_attention",
  "block_sparse_gradient",
  "merge_lse",
  "reference",
]
