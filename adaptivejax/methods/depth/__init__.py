# SPDX-License-Identifier: Apache-2.0
"""Methods that spend compute on fewer layers."""

from adaptivejax.methods.depth.calm import calm, exit_confidence
from adaptivejax.methods.depth.duo_llm import (
  DuoMlp,
  follow,
  oracle,
  pattern_losses,
  patterns,
)
from adaptivejax.methods.depth.evopress import divergence, evolve
from adaptivejax.methods.depth.ffn_skip import ffn_skip
from adaptivejax.methods.depth.mixture_of_depths import MixtureOfDepths
from adaptivejax.methods.depth.mixture_of_recursions import (
  MixtureOfRecursions,
)
from adaptivejax.methods.depth.sorted_fine_tuning import sorted_loss
from adaptivejax.methods.depth.unified_layer_skipping import (
  kept_layers,
  unified_skip,
)

__all__ = [
  "DuoMlp",
  "follow",
  "oracle",
  "pattern_losses",
  "patterns",
  "MixtureOfDepths",
  "MixtureOfRecursions",
  "calm",
  "divergence",
  "evolve",
  "exit_confidence",
  "ffn_skip",
  "kept_layers",
  "sorted_loss",
  "unified_skip",
]
