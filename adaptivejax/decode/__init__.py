# SPDX-License-Identifier: Apache-2.0
"""Batched generation, scoring and calibration over the cache."""

from adaptivejax.decode.calibration import (
  Calibration,
  calibrate,
  excess_error,
  excess_loss,
  inconsistency,
)
from adaptivejax.decode.engine import Ended, Generation, generate
from adaptivejax.decode.policies import (
  POLICIES,
  describe,
  make_policy,
  plain_settings,
  settings_of,
)
from adaptivejax.decode.scoring import Score, score
from adaptivejax.nn.stack import FULL

__all__ = [
  "FULL",
  "POLICIES",
  "Calibration",
  "Ended",
  "Generation",
  "Score",
  "calibrate",
  "describe",
  "excess_error",
  "excess_loss",
  "generate",
  "inconsistency",
  "make_policy",
  "plain_settings",
  "score",
  "settings_of",
]
