# SPDX-License-Identifier: Apache-2.0
"""Batched generation and scoring over the cache, any stack as the policy."""

from adaptivejax.decode.engine import FULL, Generation, Score, generate, score
from adaptivejax.decode.policies import POLICIES, make_policy

__all__ = [
  "FULL",
  "POLICIES",
  "Generation",
  "Score",
  "generate",
  "make_policy",
  "score",
]
