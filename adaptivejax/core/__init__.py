# SPDX-License-Identifier: Apache-2.0
"""Primitives: pure functions, arrays in, arrays out; the home of control flow."""

from adaptivejax.core.buckets import bucketed, masked
from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.covers import Cover, coins, default_cover, ladder, tiles
from adaptivejax.core.select import compact

__all__ = [
  "Cost",
  "Cover",
  "Signals",
  "bucketed",
  "coins",
  "compact",
  "default_cover",
  "flops",
  "ladder",
  "masked",
  "tiles",
]
