# SPDX-License-Identifier: Apache-2.0
"""Methods that spend compute on fewer layers."""

from adaptivejax.methods.depth import (
  deer_vla,
  dynamic_perceiver,
  jei_dnn,
  pabee,
  ponder_net,
)
from adaptivejax.methods.depth.adaptive_computation_time import (
  AdaptiveComputationTime,
)
from adaptivejax.methods.depth.calm import calm, exit_confidence
from adaptivejax.methods.depth.ffn_skip import ffn_skip
from adaptivejax.methods.depth.mixture_of_depths import MixtureOfDepths
from adaptivejax.methods.depth.sorted_fine_tuning import sorted_loss
from adaptivejax.methods.depth.unified_layer_skipping import (
  kept_layers,
  unified_skip,
)

__all__ = [
  "AdaptiveComputationTime",
  "MixtureOfDepths",
  "calm",
  "deer_vla",
  "dynamic_perceiver",
  "exit_confidence",
  "ffn_skip",
  "jei_dnn",
  "kept_layers",
  "pabee",
  "ponder_net",
  "sorted_loss",
  "unified_skip",
]
