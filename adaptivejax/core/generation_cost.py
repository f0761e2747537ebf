# SPDX-License-Identifier: Apache-2.0
"""What it costs to generate text, keys and values read included.

Sadhukhan et al., 2025, https://arxiv.org/abs/2506.05333 (sec. 3)

With P parameters, context c, L tokens generated in each of N trials, budget b
and page size p,

    compute = N (2 P L + 4 H W A + 2 H W R),    bytes = 4 G W A' + 2 G W R',
    A = sum_{t=1}^L min(b, c + t) = b L - sum_{t=1}^{min(L, b-c)} (b - c - t),
    R = sum_{t=1}^L (c + t) / p,

where dense attention has b = inf and R = 0.  Trials share the context if it is
dense, A' = sum_t (c + N t), and read each their own choice if it is not, A' = N
A; page means are shared, R' = sum_t (c + N t) / p.  Parameters are read once
for many texts, and not counted.

Departs: sums, not their integrals.  The published code adds the correction of A
in one of its laws and subtracts it in another: what is not there is not read,
so it is subtracted.
Axes: G key heads, H query heads, W head width; heads of all layers.
"""

from typing import NamedTuple


class GenerationCost(NamedTuple):
  """FLOPs, bytes of keys and values, and FLOPs with bytes in their place."""

  compute: float
  memory: float
  eflops: float


def generation_cost(
  parameters: float,
  heads: int,
  kv_heads: int,
  width: int,
  context: int,
  generated: int,
  trials: int = 1,
  *,
  budget: int | None = None,
  page: int = 16,
  intensity: float = 562.5,
) -> GenerationCost:
  """The law above, in numbers of 16 bits; a plan, so all is static.

  Args:
    parameters: P, those that a token runs.
    heads, kv_heads: H and G, added up over the layers.
    width: W.
    context, generated, trials: c, L and N.
    budget: b, tokens that a token looks at; all of them, densely, if None.
    page: p, tokens that share a mean by which they are chosen.
    intensity: FLOPs in the time of reading a byte; that of a B200, as there.

  Raises:
    ValueError: a length below 0, or another number that is not positive.
  """
  if min(context, generated) < 0 or min(trials, page) < 1:
    raise ValueError(
      f"{context=} and {generated=} must not be negative, {trials=} and {page=}"
      " be at least 1."
    )
  if budget is not None and budget < 1:
    raise ValueError(f"{budget=} must be at least 1 token; None means all.")
  steps = generated * (generated + 1) / 2
  once, shared = (
    context * generated + steps,
    context * generated + trials * steps,
  )
  if budget is None:
    seen, read, searched, means = once, shared, 0.0, 0.0
  else:
    missing = max(0, budget - context)
    seen = budget * generated - _below(missing)
    seen += _below(max(0, missing - generated))
    read = trials * seen
    searched, means = once / page, shared / page
  attention = heads * width * (4 * seen + 2 * searched)
  compute = trials * (2 * parameters * generated + attention)
  memory = kv_heads * width * (4 * read + 2 * means)
  return GenerationCost(compute, memory, compute + intensity * memory)


def _below(n: int) -> float:
  """0 + 1 + .. + (n - 1)."""
  return n * (n - 1) / 2
