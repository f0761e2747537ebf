# SPDX-License-Identifier: Apache-2.0
"""The matrix, method by law: `CASES`; see `case` for what a case says."""

from tests.laws.attention import ATTENTION
from tests.laws.blocks_of_experts import BLOCKS
from tests.laws.case import (
  LAWS,
  Case,
  close,
  compiled,
  dense_twin,
  differentiate,
  gradient,
  loss,
  no_writes,
  parameters,
)
from tests.laws.contexts import CONTEXTS
from tests.laws.decoding_attention import DECODING_ATTENTION
from tests.laws.exits import EXITS
from tests.laws.experts import EXPERTS
from tests.laws.kv import KV
from tests.laws.layers import LAYERS
from tests.laws.models import MODELS
from tests.laws.parallel import PARALLEL
from tests.laws.policies import POLICIES
from tests.laws.primitives import PRIMITIVES
from tests.laws.recurrent import RECURRENT
from tests.laws.tokens import TOKENS
from tests.laws.trained_attention import TRAINED_ATTENTION

CASES = [
  *PRIMITIVES,
  *LAYERS,
  *EXPERTS,
  *BLOCKS,
  *PARALLEL,
  *RECURRENT,
  *KV,
  *ATTENTION,
  *DECODING_ATTENTION,
  *CONTEXTS,
  *TRAINED_ATTENTION,
  *MODELS,
  *EXITS,
  *POLICIES,
  *TOKENS,
]


__all__ = [
  "ATTENTION",
  "BLOCKS",
  "CASES",
  "CONTEXTS",
  "Case",
  "DECODING_ATTENTION",
  "EXITS",
  "EXPERTS",
  "KV",
  "LAWS",
  "LAYERS",
  "MODELS",
  "PARALLEL",
  "POLICIES",
  "PRIMITIVES",
  "RECURRENT",
  "TOKENS",
  "TRAINED_ATTENTION",
  "close",
  "compiled",
  "dense_twin",
  "differentiate",
  "gradient",
  "loss",
  "no_writes",
  "parameters",
]


def held() -> dict[str, str]:
  """How many laws each method obeys, the least over its cases."""
  count: dict[str, int] = {}
  for case in CASES:
    holds = len(LAWS) - len(case.unless)
    count[case.method] = min(holds, count.get(case.method, holds))
  return {name: f"{n} of {len(LAWS)}" for name, n in sorted(count.items())}
