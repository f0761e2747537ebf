# SPDX-License-Identifier: Apache-2.0
"""Methods on how queries look at keys."""

from adaptivejax.methods.attention.flex_prefill import FlexPrefill
from adaptivejax.methods.attention.minference import MInference, assign
from adaptivejax.methods.attention.x_attention import XAttention

__all__ = ["FlexPrefill", "MInference", "XAttention", "assign"]
