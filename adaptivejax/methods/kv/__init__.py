# SPDX-License-Identifier: Apache-2.0
"""Methods on the key/value cache: what is kept of it, and how."""

from adaptivejax.methods.kv.h2o import H2O
from adaptivejax.methods.kv.snap_kv import SnapKV
from adaptivejax.methods.kv.spatten import SpAtten
from adaptivejax.methods.kv.streaming_llm import StreamingLLM

__all__ = ["H2O", "SnapKV", "SpAtten", "StreamingLLM"]
