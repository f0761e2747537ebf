# SPDX-License-Identifier: Apache-2.0
"""Methods on how queries look at keys."""

from adaptivejax.methods.attention.lightning import LightningAttention

__all__ = ["LightningAttention"]
