# SPDX-License-Identifier: Apache-2.0
"""Thin Flax NNX modules over `core`: parameters and a call, never state."""

from adaptivejax.nn.attention import Attention
from adaptivejax.nn.block import Block, Group
from adaptivejax.nn.by_block import ByBlock
from adaptivejax.nn.by_phase import ByPhase
from adaptivejax.nn.choosing import Choice, Choosing
from adaptivejax.nn.confidence import (
  MARGIN,
  MAX_PROB,
  STATE,
  MetaClassifier,
  exit_confidence,
)
from adaptivejax.nn.embedding import PatchEmbedding, WordEmbedding
from adaptivejax.nn.encoder_layer import EncoderLayer
from adaptivejax.nn.evicting import Evicting, Worth
from adaptivejax.nn.exit import early_exit
from adaptivejax.nn.expert_sharding import (
  expert_specs,
  fastest_program,
  shard_experts,
)
from adaptivejax.nn.experts import (
  ExpertSharding,
  MixtureOfExperts,
  apply_all_experts,
  apply_experts,
  apply_masked_experts,
  expert_signals,
)
from adaptivejax.nn.functional import functional
from adaptivejax.nn.lens import Lens, Through, lens_loss, through_lens
from adaptivejax.nn.look import Coded, Look, Looked, look_cost
from adaptivejax.nn.looks import (
  adopt_cache,
  empty_cache_of,
  looks_of,
  refuse_drafts,
  with_look,
)
from adaptivejax.nn.mlp import Mlp, cluster_neurons, split_mlp
from adaptivejax.nn.neurons import Neurons, by_neurons, gather_neurons
from adaptivejax.nn.norm import LayerNorm, RMSNorm
from adaptivejax.nn.out_major import OutMajor, out_major
from adaptivejax.nn.placement import reorder_experts, routing_trace
from adaptivejax.nn.plan import by_plan
from adaptivejax.nn.policy import ByStack, Policy, Step
from adaptivejax.nn.recurrent import Recurrent
from adaptivejax.nn.router import Router
from adaptivejax.nn.routing import Routing
from adaptivejax.nn.row_exit import row_exit
from adaptivejax.nn.setting import Frozen, Setting, adjust, frozen
from adaptivejax.nn.sparse_prefill import (
  ByBlocks,
  Chosen,
  SparsePrefill,
  Watch,
  coverage_of,
)
from adaptivejax.nn.stack import (
  FULL,
  StackOutput,
  every_layer,
  plain,
  present,
  run_layers,
)
from adaptivejax.nn.stacked import stacked
from adaptivejax.nn.window import Window
from adaptivejax.nn.zero_computation import ZeroComputationExperts

__all__ = [
  "Attention",
  "Block",
  "ByBlocks",
  "ByBlock",
  "ByPhase",
  "ByStack",
  "Choice",
  "Choosing",
  "Chosen",
  "Coded",
  "EncoderLayer",
  "Evicting",
  "ExpertSharding",
  "FULL",
  "Frozen",
  "Group",
  "LayerNorm",
  "Lens",
  "Look",
  "Looked",
  "MARGIN",
  "MAX_PROB",
  "MetaClassifier",
  "MixtureOfExperts",
  "Mlp",
  "Neurons",
  "OutMajor",
  "PatchEmbedding",
  "Policy",
  "RMSNorm",
  "Recurrent",
  "Router",
  "Routing",
  "STATE",
  "Setting",
  "SparsePrefill",
  "StackOutput",
  "Step",
  "Through",
  "Watch",
  "Window",
  "WordEmbedding",
  "Worth",
  "ZeroComputationExperts",
  "adjust",
  "adopt_cache",
  "apply_all_experts",
  "apply_experts",
  "apply_masked_experts",
  "by_neurons",
  "by_plan",
  "cluster_neurons",
  "coverage_of",
  "early_exit",
  "empty_cache_of",
  "every_layer",
  "exit_confidence",
  "expert_signals",
  "expert_specs",
  "fastest_program",
  "frozen",
  "functional",
  "gather_neurons",
  "lens_loss",
  "look_cost",
  "looks_of",
  "out_major",
  "plain",
  "present",
  "refuse_drafts",
  "reorder_experts",
  "routing_trace",
  "row_exit",
  "run_layers",
  "shard_experts",
  "split_mlp",
  "stacked",
  "through_lens",
  "with_look",
]
