# SPDX-License-Identifier: Apache-2.0
"""Small honest host models; methods come in as arguments."""

from adaptivejax.models.classifier import (
  Answer,
  Classifier,
  ClassifierConfig,
  Exits,
  encoder_block,
)
from adaptivejax.models.decoder import (
  DecoderConfig,
  DecoderLM,
  LMOutput,
  decoder_block,
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
  "encoder_block",
]
