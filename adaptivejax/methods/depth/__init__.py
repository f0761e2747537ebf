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
from adaptivejax.methods.depth.calm import calm, meta_loss
from adaptivejax.methods.depth.duo_llm import (
  DuoMlp,
  follow,
  oracle,
  pattern_losses,
  patterns,
)
from adaptivejax.methods.depth.evopress import divergence, evolve
from adaptivejax.methods.depth.ffn_skip import ffn_skip
from adaptivejax.methods.depth.layer_skip import (
  dropout_rates,
  exit_weights,
  layer_dropout,
)
from adaptivejax.methods.depth.mixture_of_depths import MixtureOfDepths
from adaptivejax.methods.depth.mixture_of_recursions import (
  MixtureOfRecursions,
)
from adaptivejax.methods.depth.sorted_fine_tuning import prefix, sorted_loss
from adaptivejax.methods.depth.stop_and_exit import (
  StopAndExit,
  controller_labels,
  controller_loss,
  stop_and_exit,
)
from adaptivejax.methods.depth.unified_layer_skipping import (
  kept_layers,
  unified_skip,
)

__all__ = [
  "AdaptiveComputationTime",
  "DuoMlp",
  "MixtureOfDepths",
  "MixtureOfRecursions",
  "StopAndExit",
  "calm",
  "controller_labels",
  "controller_loss",
  "deer_vla",
  "divergence",
  "dropout_rates",
  "dynamic_perceiver",
  "evolve",
  "exit_weights",
  "ffn_skip",
  "follow",
  "jei_dnn",
  "kept_layers",
  "layer_dropout",
  "meta_loss",
  "oracle",
  "pabee",
  "pattern_losses",
  "patterns",
  "ponder_net",
  "prefix",
  "sorted_loss",
  "stop_and_exit",
  "unified_skip",
]
