# SPDX-License-Identifier: Apache-2.0
"""Batched generation and scoring over the cache, any stack as the policy."""

from adaptivejax.decode.engine import (
  Ended,
  Generation,
  Score,
  generate,
  score,
)
from adaptivejax.decode.policies import POLICIES, make_policy
from adaptivejax.nn.stack import FULL

__all__ = [
  "FULL",
  "POLICIES",
  "Ended",
  "Generation",
  "Score",
  "generate",
  "make_policy",
  "score",
]
