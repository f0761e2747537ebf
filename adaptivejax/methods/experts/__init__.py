# SPDX-License-Identifier: Apache-2.0
"""Methods that spend compute on some experts of many."""

from adaptivejax.methods.experts.exflow import (
  affinity,
  apply_placement,
  hops,
  in_order,
  placement,
)
from adaptivejax.methods.experts.tutel import TutelRouter, tutel_capacity

__all__ = [
  "TutelRouter",
  "affinity",
  "apply_placement",
  "hops",
  "in_order",
  "placement",
  "tutel_capacity",
]
