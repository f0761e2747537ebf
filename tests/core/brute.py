# SPDX-License-Identifier: Apache-2.0
"""What the core must equal: NumPy in f64, one row at a time, by hand.

The row function of these tests is `y = scale * tanh(r w + b)`: `w` an operand,
`b` a traced array that it closes over, `scale` an integer operand.  The oracle
shares no code with the library and never reads an unselected row.

Axes: N items, D features in, E features out.
"""

import math

import jax.numpy as jnp
import numpy as np

SCALE = 3


def layer(b):
  """The row function, closed over `b`."""
  return lambda rows, w, scale: jnp.tanh(rows @ w + b) * scale


def forward(x, mask, w, b, keep):
  x, w, b = (np.asarray(a, np.float64) for a in (x, w, b))
  y = np.array(x) if keep else np.zeros((len(x), w.shape[1]))
  for i in np.flatnonzero(mask):
    y[i] = SCALE * np.tanh(x[i] @ w + b)
  return y


def backward(x, mask, w, b, dy, keep):
  """`(dx, dw, db)` for the cotangent `dy`."""
  x, w, b, dy = (np.asarray(a, np.float64) for a in (x, w, b, dy))
  dx = np.array(dy) if keep else np.zeros_like(x)
  dw, db = np.zeros_like(w), np.zeros_like(b)
  for i in np.flatnonzero(mask):
    slope = dy[i] * SCALE * (1 - np.tanh(x[i] @ w + b) ** 2)
    dx[i] = w @ slope
    dw += np.outer(x[i], slope)
    db += slope
  return dx, dw, db


def close(got, want, tol=1e-5):
  """Equal up to `tol` of the largest number; NaN and inf in the same places."""
  finite = np.abs(want[np.isfinite(want)])
  scale = max(1.0, finite.max()) if finite.size else 1.0
  got = np.asarray(got, np.float64)
  np.testing.assert_allclose(got, want, rtol=tol, atol=tol * scale)


def poisoned(x, mask):
  """`x` with NaN, inf and -inf in the unselected rows, by turns."""
  bad = np.resize([np.nan, np.inf, -np.inf], len(x))
  full = np.broadcast_to(bad.reshape(-1, *[1] * (x.ndim - 1)), x.shape)
  keep = np.asarray(mask).reshape(-1, *[1] * (x.ndim - 1))
  return np.where(keep, x, full).astype(x.dtype)


def masks(n, sizes=()):
  """Adversarial selections of n items, and counts around chunk borders."""
  random = np.random.default_rng(n)
  item = np.arange(n)
  counts = {s + d for s in sizes for d in (-1, 0, 1)} | {n // 3, n - 1}
  yield np.zeros(n, bool)
  yield np.ones(n, bool)
  yield item == 0
  yield item == n - 1
  yield item % 2 == 1
  yield item >= n // 2
  for count in sorted(c for c in counts if 0 < c <= n):
    yield random.permutation(item < count)


def ladder_slots(count, rungs):
  """Rows run: the smallest rung that holds `count`, else top rungs."""
  if count == 0:
    return 0
  fits = [rung for rung in rungs if rung >= count]
  return min(fits) if fits else math.ceil(count / max(rungs)) * max(rungs)


def coin_slots(count, sizes):
  """Rows run: pay with coins, the largest first, one by one."""
  left, slots = count, 0
  for size in sizes:
    last = size == sizes[-1]
    short = last or size - left <= min(sizes[-1], size // 8)
    while left > 0 and (last or left >= size or short):
      left, slots = left - size, slots + size
      short = size - left <= min(sizes[-1], size // 8)
  return slots
