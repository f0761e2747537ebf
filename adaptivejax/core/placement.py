# SPDX-License-Identifier: Apache-2.0
"""Experts of several layers on devices, so that ways are short; on the host.

Axes: L layers, P = L - 1 pairs of them, E experts, G devices.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment


def way_price(
  counts: Int[np.ndarray, "P E E"],
  place: Int[np.ndarray, "L E"],
  distance: Float[np.ndarray, "G G"],
) -> float:
  """The distance of all ways together.

  Args:
    counts: how often expert i of a layer is followed by j of the next.
    place: device of each expert of each layer.
    distance: from device to device.
  """
  pairs = zip(counts, place, place[1:])
  return float(sum((n * distance[a][:, b]).sum() for n, a, b in pairs))


def shorten_ways(
  counts: Int[np.ndarray, "P E E"],
  place: Int[np.ndarray, "L E"],
  distance: Float[np.ndarray, "G G"],
) -> Int[np.ndarray, "L E"]:
  """A placement no dearer than `place`, as even: a local optimum.

  Each layer in turn is placed best given its neighbours, which is an assignment
  of experts to places; then the devices of all layers from one on are exchanged
  together, an assignment of devices to devices; until neither helps.
  """
  (layers, experts), devices = place.shape, len(distance)
  slots, one = np.sort(place[0]), np.eye(devices)
  place, seen = place.copy(), np.inf
  while (now := way_price(counts, place, distance)) < seen:
    seen = now
    for l in range(layers):
      price = np.zeros((experts, devices))
      if l:
        price += counts[l - 1].T @ distance[place[l - 1]]
      if l + 1 < layers:
        price += counts[l] @ distance[:, place[l + 1]].T
      place[l] = slots[linear_sum_assignment(price[:, slots])[1]]
    for l in range(1, layers):
      flow = one[place[l - 1]].T @ counts[l - 1] @ one[place[l]]
      name = linear_sum_assignment(flow.T @ distance)[1]
      moved = np.concatenate([place[:l], name[place[l:]]])
      place = min(place, moved, key=lambda p: way_price(counts, p, distance))
  return place
