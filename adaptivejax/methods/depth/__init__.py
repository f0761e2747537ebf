# SPDX-License-Identifier: Apache-2.0
"""Methods that spend compute on fewer layers."""

from adaptivejax.methods.depth.calm import calm, exit_confidence
from adaptivejax.methods.depth.ffn_skip import ffn_skip
from adaptivejax.methods.depth.layer_skip import (
  dropout_rates,
  exit_weights,
  layer_dropout,
)
from adaptivejax.methods.depth.mixture_of_depths import MixtureOfDepths
from adaptivejax.methods.depth.sorted_fine_tuning import sorted_loss
from adaptivejax.methods.depth.unified_layer_skipping import (
  kept_layers,
  unified_skip,
)

__all__ = [
  "MixtureOfDepths",
  "calm",
  "dropout_rates",
  "exit_confidence",
  "exit_weights",
  "ffn_skip",
  "kept_layers",
  "layer_dropout",
  "sorted_loss",
  "unified_skip",
]
