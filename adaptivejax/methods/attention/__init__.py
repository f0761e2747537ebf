# SPDX-License-Identifier: Apache-2.0
"""Methods on how queries look at keys."""

from adaptivejax.methods.attention.ape import APE, parallel_context
from adaptivejax.methods.attention.delta import DELTA
from adaptivejax.methods.attention.flex_prefill import FlexPrefill
from adaptivejax.methods.attention.kinetics import Kinetics, kinetics_cost
from adaptivejax.methods.attention.lightning import LightningAttention
from adaptivejax.methods.attention.minference import Budgets, MInference, assign
from adaptivejax.methods.attention.moba import MoBA
from adaptivejax.methods.attention.nsa import NSA
from adaptivejax.methods.attention.quest import Quest
from adaptivejax.methods.attention.token_select import TokenSelect
from adaptivejax.methods.attention.x_attention import XAttention

__all__ = [
  "APE",
  "Budgets",
  "DELTA",
  "FlexPrefill",
  "Kinetics",
  "LightningAttention",
  "MInference",
  "MoBA",
  "NSA",
  "Quest",
  "TokenSelect",
  "XAttention",
  "assign",
  "kinetics_cost",
  "parallel_context",
]
