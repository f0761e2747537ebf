# SPDX-License-Identifier: Apache-2.0
"""Methods on how queries look at keys."""

from adaptivejax.methods.attention.lightning import LightningAttention
from adaptivejax.methods.attention.moba import MoBA
from adaptivejax.methods.attention.nsa import NSA

__all__ = [
  "LightningAttention",
  "MoBA",
  "NSA",
]
