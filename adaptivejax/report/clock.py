# SPDX-License-Identifier: Apache-2.0
"""Timing programs against each other on a machine that others use too.

A machine's speed drifts, and other work comes and goes.  So the sides of a
comparison run alternately in one process, a figure is the ratio of two timings
of the same round, and what is reported is the median over the rounds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

Call = Callable[[int], Any]


def interleave(
  calls: Sequence[Call],
  *,
  seconds: float,
  least: int = 5,
  most: int = 101,
  floor: float = 0.002,
  warm: bool = True,
  before: Callable[[], Any] | None = None,
  clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
  """Times the calls in turn, round after round: `times[call][round]`.

  Args:
    calls: each is given the number of the round, so that it can vary its data,
      and returns what must be ready (arrays, or nothing).
    seconds: begin no further round after this time.
    least, most: limits on the number of rounds, which win over `seconds`.
    floor: repeat a call within its round until it has run for so long, and
      take the mean: short calls drown in the noise of the timer.
    warm: call each once before, untimed; programs that were compiled ahead
      (`jit(f).lower(..).compile()`) and run for long may do without.
    before: run ahead of each call, untimed.
    clock: seconds that only go up.

  The order turns around from round to round, so no side always goes first.
  """
  for call in calls if warm else ():
    jax.block_until_ready(call(0))
  times: list[list[float]] = [[] for _ in calls]
  begin = clock()
  for i in range(max(most, least)):
    if i >= least and clock() - begin > seconds:
      break
    order = range(len(calls))
    for side in order if i % 2 == 0 else reversed(order):
      if before:
        before()
      times[side].append(_time(calls[side], i, floor, clock))
  return times


def _time(
  call: Call, i: int, floor: float, clock: Callable[[], float]
) -> float:
  begin, count, spent = clock(), 0, -1.0
  while spent < floor:
    jax.block_until_ready(call(i))
    count, spent = count + 1, clock() - begin
  return spent / count


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
  """Lower quartile, median and upper quartile of one value or more."""
  if len(values) == 1:
    return (values[0],) * 3
  low, middle, high = statistics.quantiles(values, method="inclusive")
  return low, middle, high
