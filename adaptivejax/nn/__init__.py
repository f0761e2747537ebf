# SPDX-License-Identifier: Apache-2.0
"""Thin Flax NNX modules over `core`: parameters and a call, never state."""

from adaptivejax.nn.attention import Attention
from adaptivejax.nn.block import Block, Group
from adaptivejax.nn.functional import functional
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.norm import LayerNorm, RMSNorm
from adaptivejax.nn.policy import ByStack, Policy, Step
from adaptivejax.nn.router import Router
from adaptivejax.nn.setting import Setting, adjust
from adaptivejax.nn.stack import (
  FULL,
  StackOutput,
  every_layer,
  plain,
  run_layers,
)

__all__ = [
  "FULL",
  "Attention",
  "Block",
  "ByStack",
  "Group",
  "LayerNorm",
  "Mlp",
  "Policy",
  "RMSNorm",
  "Router",
  "Setting",
  "StackOutput",
  "Step",
  "adjust",
  "every_layer",
  "functional",
  "plain",
  "run_layers",
]
