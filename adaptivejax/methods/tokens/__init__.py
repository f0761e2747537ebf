# SPDX-License-Identifier: Apache-2.0
"""Methods that spend compute on fewer tokens."""

from adaptivejax.methods.tokens.adaptive_token_sampling import (
  adaptive_token_sampling,
)
from adaptivejax.methods.tokens.token_merging import (
  similar_merging,
  token_merging,
)
from adaptivejax.methods.tokens.token_pruning import token_pruning

__all__ = [
  "adaptive_token_sampling",
  "similar_merging",
  "token_merging",
  "token_pruning",
]
