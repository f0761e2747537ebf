# SPDX-License-Identifier: Apache-2.0
"""Attention of a few queries over listed tokens or pages of a cache."""

from pallas_kernels.block_sparse_attention.types import Attended, Marks, Rule
from pallas_kernels.sparse_decode_attention.ops import sparse_decode_attention
from pallas_kernels.sparse_decode_attention.types import Units

__all__ = ["Attended", "Marks", "Rule", "Units", "sparse_decode_attention"]
