# SPDX-License-Identifier: Apache-2.0
"""One paper, one file: compositions of `core`, sorted by what they adapt."""

from adaptivejax.methods import attention, depth, experts, kv, tokens, width

__all__ = [
  "attention",
  "depth",
  "experts",
  "kv",
  "tokens",
  "width",
]
