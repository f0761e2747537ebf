# SPDX-License-Identifier: Apache-2.0
"""Methods on how queries look at keys."""

from adaptivejax.methods.attention.flex_prefill import FlexPrefill
from adaptivejax.methods.attention.lightning import LightningAttention
from adaptivejax.methods.attention.minference import Budgets, MInference, assign
from adaptivejax.methods.attention.x_attention import XAttention

__all__ = [
  "Budgets",
  "FlexPrefill",
  "LightningAttention",
  "MInference",
  "XAttention",
  "assign",
]
