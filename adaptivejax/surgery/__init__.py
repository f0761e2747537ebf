# SPDX-License-Identifier: Apache-2.0
"""Surgery: trained models made adaptive, exactly, before anything is learned.

Pure functions from a model to a model.  What they return says what the model
said (`exactness`) as long as its budget is full; distillation
(`training.distill`) then makes it good at smaller ones.  Methods that change no
weights are policies, stacks and looks: `decode.make_policy`, `nn.with_look`.
"""

from adaptivejax.surgery.depth import keep_layers, to_mixture_of_depths
from adaptivejax.surgery.exact import exactness, full_budget
from adaptivejax.surgery.layers import group_layers, map_layers, map_mlps
from adaptivejax.surgery.width import neuron_sizes, to_acm, to_dense, to_experts

__all__ = [
  "exactness",
  "full_budget",
  "group_layers",
  "keep_layers",
  "map_layers",
  "map_mlps",
  "neuron_sizes",
  "to_acm",
  "to_dense",
  "to_experts",
  "to_mixture_of_depths",
]
