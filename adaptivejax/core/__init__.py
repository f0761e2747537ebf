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
from adaptivejax.core.levels import level_apply, prefix_slice
from adaptivejax.core.losses import (
  accuracy,
  binary_cross_entropy,
  cross_entropy,
)
from adaptivejax.core.plans import (
  PlanTable,
  run_anyway,
  run_if,
  run_plan,
  specialize,
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
  "KVCache",
  "Keys",
  "PlanTable",
  "Signals",
  "accuracy",
  "append",
  "attend",
  "binary_cross_entropy",
  "bucketed",
  "budget_loss",
  "chunk_union",
  "coins",
  "compact",
  "cross_entropy",
  "default_cover",
  "depth_loop",
  "depth_scan",
  "exit_depth",
  "exit_fractions",
  "expert_choice",
  "flops",
  "gumbel_sigmoid",
  "gumbel_softmax",
  "kv_propagate",
  "ladder",
  "leave_empty",
  "level_apply",
  "masked",
  "prefix_slice",
  "rotary",
  "run_anyway",
  "run_if",
  "run_plan",
  "share_from",
  "solve_depth_threshold",
  "solve_exit_thresholds",
  "solve_setting",
  "specialize",
  "straight_through",
  "threshold",
  "tiles",
  "top_k",
  "top_p",
]
