# SPDX-License-Identifier: Apache-2.0
"""Methods that spend compute on some experts of many."""

from adaptivejax.methods.experts.block_ffn import BlockFFN
from adaptivejax.methods.experts.deepseek import DeepSeekRouter
from adaptivejax.methods.experts.dynamic_top_p import TopPRouter
from adaptivejax.methods.experts.exflow import (
  apply_placement,
  expert_affinity,
  in_order,
  mean_hops,
  place_experts,
)
from adaptivejax.methods.experts.expert_choice import ExpertChoiceRouter
from adaptivejax.methods.experts.factor_llm import FactorLLM
from adaptivejax.methods.experts.mixtral import MixtralRouter
from adaptivejax.methods.experts.mixture_of_experts_plus_plus import MoEPlusPlus
from adaptivejax.methods.experts.soft_moe import SoftMoE
from adaptivejax.methods.experts.switch import SwitchRouter
from adaptivejax.methods.experts.tutel import TutelRouter, tutel_capacity

__all__ = [
  "BlockFFN",
  "DeepSeekRouter",
  "ExpertChoiceRouter",
  "FactorLLM",
  "MixtralRouter",
  "MoEPlusPlus",
  "SoftMoE",
  "SwitchRouter",
  "TopPRouter",
  "TutelRouter",
  "expert_affinity",
  "apply_placement",
  "mean_hops",
  "in_order",
  "place_experts",
  "tutel_capacity",
]
