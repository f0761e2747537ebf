# SPDX-License-Identifier: Apache-2.0
r"""ExFlow: experts that follow one another on a token's way share a device.

Yao et al., 2024, https://arxiv.org/abs/2401.08383

Experts of adjacent layers have affinity, P(expert j of layer l+1 | expert i of
layer l).  From a trace of where tokens went, A[l, i, j] counts it; E experts of
each layer are placed on G devices, E/G on each, so that tokens stay where they
are as often as can be:

    min_place  sum_{l, i, j} A[l, i, j] d(place[l, i], place[l+1, j])

with d = 1 between devices and 0 on one (or dearer between nodes).  A placement
is a permutation of the experts, after which the model computes what it did.

The search is a descent by linear assignments (`core.placement`), from several
starts.

Primitive: host search, `nn.reorder_experts`.
Departs: the paper solves an integer programme.  Tokens that stay still go
through the all-to-all, to their own device; context on every device, and with
it one all-to-all in place of two, is not here.
Axes: T tokens, L layers, P = L - 1 pairs of them, E experts, G devices.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from adaptivejax.core.placement import shorten_ways, way_price
from adaptivejax.nn.placement import reorder_experts


def expert_affinity(
  trace: Int[np.ndarray, "T L"], experts: int
) -> Int[np.ndarray, "P E E"]:
  """A: how often expert i is followed by j; -1 in a trace is no expert."""
  if 0 in trace.shape or trace.shape[1] < 2 or trace.max() >= experts:
    raise ValueError(
      f"a trace must name one of {experts} experts for each token in each of"
      f" at least 2 layers; got shape {trace.shape}."
    )
  counts = np.zeros((trace.shape[1] - 1, experts, experts), np.int64)
  for l, pairs in enumerate(counts):
    there = (trace[:, l] >= 0) & (trace[:, l + 1] >= 0)
    np.add.at(pairs, (trace[there, l], trace[there, l + 1]), 1)
  return counts


def mean_hops(
  trace: Int[np.ndarray, "T L"],
  place: Int[np.ndarray, "L E"],
  distance: Float[np.ndarray, "G G"] | None = None,
) -> float:
  """What a token pays for changing devices on its way, on average.

  Args:
    trace: expert of each token in each layer.
    place: device of each expert of each layer.
    distance: price of a hop; 1 between any two devices if not given.
  """
  counts = expert_affinity(trace, place.shape[1])
  return way_price(counts, place, _distances(place, distance)) / len(trace)


def in_order(layers: int, experts: int, devices: int) -> np.ndarray:
  """The placement of who does not care: experts as they are numbered."""
  if devices < 1 or experts % devices:
    raise ValueError(
      f"{experts} experts cannot be placed evenly on {devices=}: take a number"
      " of devices that divides them."
    )
  return np.tile(np.arange(experts) * devices // experts, (layers, 1))


def place_experts(
  counts: Int[np.ndarray, "P E E"],
  devices: int,
  *,
  distance: Float[np.ndarray, "G G"] | None = None,
  starts: int = 8,
  seed: int = 0,
) -> Int[np.ndarray, "L E"]:
  """The device of each expert of each layer, E/G on each; all is static.

  Args:
    counts: A, of `expert_affinity`.
    devices: G; divides E.
    distance: price of a hop; 1 between any two devices if not given.
    starts: one from the experts in order, the others from chance.
  """
  if starts < 1:
    raise ValueError(f"the search needs at least 1 start; got {starts=}.")
  first = in_order(len(counts) + 1, counts.shape[1], devices)
  distance, rng = _distances(first, distance), np.random.default_rng(seed)
  drawn = [rng.permuted(first, axis=1) for _ in range(starts - 1)]
  found = [shorten_ways(counts, start, distance) for start in [first, *drawn]]
  return min(found, key=lambda place: way_price(counts, place, distance))


def apply_placement(model: Any, place: Int[np.ndarray, "..."]) -> Any:
  """The same function, its experts in the order of their devices.

  Args:
    model: holds one `MixtureOfExperts`, whose layers may be stacked.
    place: device of each expert, i32[E]; i32[L, E] for stacked layers.
  """
  return reorder_experts(model, np.argsort(place, axis=-1, kind="stable"))


def _distances(place, distance) -> np.ndarray:
  if distance is None:
    return 1.0 - np.eye(int(place.max()) + 1)
  return np.asarray(distance, float)
