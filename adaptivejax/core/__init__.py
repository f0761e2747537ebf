# SPDX-License-Identifier: Apache-2.0
"""Primitives: pure functions of arrays; the one home of control flow."""

from adaptivejax.core.attention import Keys, attend, rotary
from adaptivejax.core.buckets import bucketed, masked
from adaptivejax.core.budget import (
  budget_loss,
  exit_depth,
  exit_fractions,
  solve_depth_threshold,
  solve_exit_thresholds,
  solve_setting,
)
from adaptivejax.core.cache import (
  KVCache,
  append,
  kv_propagate,
  leave_empty,
  share_from,
)
from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.covers import Cover, coins, default_cover, ladder, tiles
from adaptivejax.core.depth import Depth, depth_loop, depth_scan
from adaptivejax.core.halting import (
  EntropyRing,
  Ponder,
  Streak,
  cdf,
  delta,
  entropy,
  exit_distribution,
  logit_margin,
  margin,
  max_prob,
  patience,
  ponder,
  saturation,
)
from adaptivejax.core.levels import level_apply, prefix_slice
from adaptivejax.core.losses import (
  accuracy,
  binary_cross_entropy,
  cross_entropy,
)
from adaptivejax.core.select import (
  chunk_union,
  compact,
  expert_choice,
  gumbel_sigmoid,
  gumbel_softmax,
  straight_through,
  threshold,
  top_k,
  top_p,
)

__all__ = [
  "Cost",
  "Cover",
  "Depth",
  "EntropyRing",
  "KVCache",
  "Keys",
  "Ponder",
  "Signals",
  "Streak",
  "accuracy",
  "append",
  "attend",
  "binary_cross_entropy",
  "bucketed",
  "budget_loss",
  "cdf",
  "chunk_union",
  "coins",
  "compact",
  "cross_entropy",
  "default_cover",
  "delta",
  "depth_loop",
  "depth_scan",
  "entropy",
  "exit_depth",
  "exit_distribution",
  "exit_fractions",
  "expert_choice",
  "flops",
  "gumbel_sigmoid",
  "gumbel_softmax",
  "kv_propagate",
  "ladder",
  "leave_empty",
  "level_apply",
  "logit_margin",
  "margin",
  "masked",
  "max_prob",
  "patience",
  "ponder",
  "prefix_slice",
  "rotary",
  "saturation",
  "share_from",
  "solve_depth_threshold",
  "solve_exit_thresholds",
  "solve_setting",
  "straight_through",
  "threshold",
  "tiles",
  "top_k",
  "top_p",
]
