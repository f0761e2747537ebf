# SPDX-License-Identifier: Apache-2.0
"""Methods on how queries look at keys."""

from adaptivejax.methods.attention.ape import APE, parallel_context
from adaptivejax.methods.attention.delta import DELTA
from adaptivejax.methods.attention.kinetics import Kinetics, kinetics_cost
from adaptivejax.methods.attention.lightning import LightningAttention
from adaptivejax.methods.attention.quest import Quest
from adaptivejax.methods.attention.token_select import TokenSelect

__all__ = [
  "APE",
  "DELTA",
  "Kinetics",
  "LightningAttention",
  "Quest",
  "TokenSelect",
  "kinetics_cost",
  "parallel_context",
]
