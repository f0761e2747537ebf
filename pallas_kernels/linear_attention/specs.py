# SPDX-License-Identifier: Apache-2.0
"""The shapes that tests and benchmarks share."""

from typing import NamedTuple


class Spec(NamedTuple):
  """q, k: [batch, heads, tokens, width]; v: [batch, heads, tokens, out_width].

  `chunk` is the tokens of a chunk.
  """

  name: str
  batch: int
  heads: int
  tokens: int
  width: int
  out_width: int
  chunk: int = 128


LONG = Spec("long", 1, 4, 8192, 128, 128)
"""A head of usual width and a context for which the quadratic form is slow."""

TINY = Spec("tiny", 2, 2, 70, 8, 12, chunk=16)
"""For the interpreter: tokens are no multiple of a chunk, D is not E."""
