# SPDX-License-Identifier: Apache-2.0
"""One paper, one file: compositions of `core`, sorted by what they adapt."""

from adaptivejax.methods import depth, experts, width

__all__ = ["depth", "experts", "width"]
