# SPDX-License-Identifier: Apache-2.0
"""Policies that draft: the text of plain decoding, in fewer steps.

Axes: W prompts, P their tokens, T tokens made.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adaptivejax import decode
from adaptivejax.core.trigrams import TrigramTable
from adaptivejax.methods.decode import ADED, SelfSpeculation
from adaptivejax.report.clock import interleave, quartiles
from adaptivejax.report.data import Point


class Drafted(NamedTuple):
  """A policy beside plain decoding, on the same prompts.

  Attributes:
    point: of the report.
    same: prompts whose text is that of plain decoding, a share.
    steps: tokens made per step.
  """

  point: Point
  same: float
  steps: float


def policies(bench) -> Iterator[tuple[str, str, Any]]:
  """`(method, setting, policy)` of each."""
  table = TrigramTable.build([bench.text.train.reshape(-1)])
  yield "ADED", "4 nodes", ADED(table, nodes=4, depth=3)
  exit = bench.layers * 3 // 4
  yield "Self-speculation", f"{exit} layers draft 2", SelfSpeculation(exit, 2)


def measured(bench, dense: Point) -> Iterator[Drafted]:
  """Greedy texts of held-out prompts; the prompts count, in time, for both.

  Args:
    bench: see `adapt.bench`.
    dense: the model as it was, decoding.
  """
  prompts = jnp.asarray(bench.text.test[:, : bench.config.prompt])
  steps, some = bench.config.sample, min(len(prompts), 3)
  write = lambda prompts, policy=decode.FULL: decode.generate(
    bench.fast, prompts, steps=steps, policy=policy
  )
  plain = write(prompts)
  for method, setting, policy in policies(bench):
    base, own = interleave(
      [
        lambda i: write(prompts[i % some][None]),
        lambda i, policy=policy: write(prompts[i % some][None], policy),
      ],
      seconds=bench.config.seconds,
      least=3,
    )
    made = write(prompts, policy)
    same = np.asarray(plain.tokens == made.tokens).all(1).mean()
    low, middle, high = quartiles([a / b for a, b in zip(base, own)])
    point = Point(
      method=method,
      setting=setting,
      regime="decode",
      bits_per_byte=dense.bits_per_byte if same == 1 else math.nan,
      tokens_per_second=steps / quartiles(own)[1],
      speedup=middle,
      spread=(low, high),
      flops_share=float(made.cost.spent / made.cost.full),
      mean_depth=float(made.mean_depth),
      perplexity=dense.perplexity if same == 1 else math.nan,
    )
    yield Drafted(point, float(same), float(made.tokens_per_step))
