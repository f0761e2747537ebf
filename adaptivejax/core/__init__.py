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
  commit_path,
  crop,
  kv_propagate,
  leave_empty,
  share_from,
)
from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.covers import Cover, coins, default_cover, ladder, tiles
from adaptivejax.core.depth import Depth, depth_loop, depth_scan
from adaptivejax.core.drafts import Verified, draft_verify
from adaptivejax.core.halting import (
  EntropyRing,
  Streak,
  cdf,
  delta,
  entropy,
  exit_distribution,
  logit_margin,
  margin,
  max_prob,
  patience,
  saturation,
)
from adaptivejax.core.levels import level_apply, prefix_slice
from adaptivejax.core.losses import (
  accuracy,
  binary_cross_entropy,
  cross_entropy,
  exit_cross_entropy,
)
from adaptivejax.core.sampling import Draw, Sampling, log_probs
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
from adaptivejax.core.staged import freeze, masked_scan, staged_while
from adaptivejax.core.trees import Path, Tree, ancestors, depths, tree_verify
from adaptivejax.core.trigrams import TrigramTable

__all__ = [
  "Cost",
  "Cover",
  "Depth",
  "EntropyRing",
  "Draw",
  "KVCache",
  "Keys",
  "Path",
  "Sampling",
  "Signals",
  "Streak",
  "Tree",
  "TrigramTable",
  "Verified",
  "accuracy",
  "ancestors",
  "append",
  "attend",
  "binary_cross_entropy",
  "bucketed",
  "budget_loss",
  "cdf",
  "chunk_union",
  "coins",
  "commit_path",
  "compact",
  "crop",
  "cross_entropy",
  "default_cover",
  "delta",
  "depth_loop",
  "depth_scan",
  "entropy",
  "depths",
  "draft_verify",
  "exit_cross_entropy",
  "exit_depth",
  "exit_distribution",
  "exit_fractions",
  "expert_choice",
  "flops",
  "freeze",
  "masked_scan",
  "staged_while",
  "gumbel_sigmoid",
  "gumbel_softmax",
  "kv_propagate",
  "ladder",
  "leave_empty",
  "level_apply",
  "logit_margin",
  "margin",
  "log_probs",
  "masked",
  "max_prob",
  "patience",
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
  "tree_verify",
]
