# SPDX-License-Identifier: Apache-2.0
"""Causal linear attention with decay: a state instead of a cache."""

from pallas_kernels.linear_attention.ops import (
  linear_attention,
  linear_attention_step,
)

__all__ = ["linear_attention", "linear_attention_step"]
