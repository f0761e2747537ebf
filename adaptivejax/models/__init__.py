# SPDX-License-Identifier: Apache-2.0
"""Small honest host models; methods come in as arguments."""

from adaptivejax.models.classifier import (
  Answer,
  Classifier,
  ClassifierConfig,
  Exits,
  encoder_block,
)
from adaptivejax.models.decoder import DecoderLM, LMOutput
from adaptivejax.models.decoder_layer import (
  DecoderConfig,
  decoder_block,
  decoder_mlp,
)

__all__ = [
  "Answer",
  "Classifier",
  "ClassifierConfig",
  "DecoderConfig",
  "DecoderLM",
  "Exits",
  "LMOutput",
  "decoder_block",
  "decoder_mlp",
  "encoder_block",
]
