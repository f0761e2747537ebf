# SPDX-License-Identifier: Apache-2.0
r"""Unified layer skipping: every decoded token skips the same layers.

Liu et al., 2024, https://arxiv.org/abs/2404.06954

For a speed-up r keep n = floor(L / r) of the layers: the first and the last,
and between them every floor(L / (n - 1))-th until n are kept.  The prompt runs
all layers.  The plan depends on nothing but r, so there is no conditional, and
no missing keys: a skipped layer is never asked while decoding.

Primitive: a static plan, `nn.stack.run_layers` over the kept layers.
Departs: n = 1 keeps the last layer (published code divides by n - 1); `rounded`
spaces the kept layers evenly, where the rule leaves a dense tail.
Axes: L layers, K kept, B batch, T tokens, D features.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adaptivejax.nn.stack import (
  StackOutput,
  checked_by,
  layer_count,
  plain,
  run_layers,
)


def kept_layers(
  layers: int, speedup: float, *, rounded: bool = False
) -> tuple[int, ...]:
  """Indices of the layers to keep, ascending (static)."""
  if layers < 1 or not 1 <= speedup <= layers:
    raise ValueError(
      f"{speedup=} must lie in 1..{layers}, the layers there are."
    )
  n = int(layers / speedup)
  if n == 1:
    return (layers - 1,)
  if rounded:
    return tuple(round(i * (layers - 1) / (n - 1)) for i in range(n))
  interval = int(layers / (n - 1))
  inner = [i for i in range(1, layers - 1) if i % interval == 0][: n - 2]
  return (0, *inner, layers - 1)


def _check(total, *, kept=None, **settings):
  del settings
  if kept is None:
    return
  if not 1 <= len(kept) <= total:
    raise ValueError(
      f"`kept` must name 1..{total} of the layers; got {len(kept)}. Make it"
      " with `kept_layers`."
    )
  if isinstance(kept, jax.core.Tracer):
    return
  known = np.asarray(kept)
  if known.min() < 0 or known.max() >= total or (np.diff(known) <= 0).any():
    raise ValueError(
      f"`kept` must rise within 0..{total - 1}, the layers there are; got"
      f" {known}. Make it with `kept_layers`."
    )


@checked_by(_check)
def unified_skip(
  layers,
  x: Float[Array, "B T D"],
  positions,
  cache=None,
  *,
  readout,
  key=None,
  kept: Int[Array, " K"],
) -> StackOutput:
  """A stack that runs the `kept` layers when decoding (T = 1).

  Args:
    kept: layer indices, rising; which ones is data, how many is static.

  Other arguments as in `nn.stack`.
  """
  total, count = layer_count(layers), kept.shape[0]
  if cache is None or x.shape[1] > 1:
    return plain(layers, x, positions, cache, readout=readout, key=key)
  x, cache, cost, signals = run_layers(layers, x, positions, cache, kept)
  shares = jnp.zeros(total).at[kept].set(cost.share)
  cost = cost.total()
  cost = cost._replace(full=cost.full * total / count)
  depth = jnp.full(x.shape[:2], count * layers.depth, jnp.float32)
  signals = signals.mean()
  return StackOutput(x, cache, cost, signals, depth, shares)
