# SPDX-License-Identifier: Apache-2.0
"""Small honest host models; methods come in as arguments."""

from adaptivejax.models.decoder import (
  DecoderConfig,
  DecoderLM,
  LMOutput,
  decoder_block,
)

__all__ = ["DecoderConfig", "DecoderLM", "LMOutput", "decoder_block"]
