# SPDX-License-Identifier: Apache-2.0
"""The public block-sparse attention."""

from pallas_kernels.block_sparse_attention.reference import (
  block_sparse_attention,
)

__all__ = ["block_sparse_attention"]
