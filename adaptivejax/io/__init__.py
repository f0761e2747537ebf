# SPDX-License-Identifier: Apache-2.0
"""Pretrained models in and out: Hugging Face safetensors, GGUF in."""

from adaptivejax.io.pretrained import Pretrained, load
from adaptivejax.io.saving import save

__all__ = ["Pretrained", "load", "save"]
