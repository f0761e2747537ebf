# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run must agree on, beside arrays.

What a process learns alone, others do not know: which files it finds, that it
may not write, that it was told to stop.  A process that acts on it alone leaves
the others waiting for ever, so here all act alike.  Process 0 writes.

Axes: P processes, F facts, N devices.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Shaped


def is_writer() -> bool:
  """Whether this process writes files, and talks to the person: process 0."""
  return jax.process_index() == 0


def by_writer(act: Callable[[], Any]) -> None:
  """Runs `act` on process 0, and waits for it.

  Raises:
    ValueError, OSError: what it raises there; elsewhere, that it did.
  """
  error = None
  if is_writer():
    try:
      act()
    except (ValueError, OSError) as failure:
      error = failure
  failed = everyone(np.array(error is not None)).any()
  if error is not None:
    raise error
  if failed:
    raise ValueError("process 0 cannot go on, as it says itself")


def check_same(facts: Mapping[str, Any]) -> None:
  """Waits for all processes, and compares what they take for granted.

  Raises:
    ValueError: on all of them, if a fact differs; it must print what it is.
  """
  digests = [zlib.crc32(repr(fact).encode()) for fact in facts.values()]
  for name, column in zip(facts, everyone(np.array(digests, np.uint32)).T):
    others = np.flatnonzero(column != column[0])
    if len(others):
      raise ValueError(
        f"{name} of process {others[0]} is not that of process 0: the processes"
        " of a run need the same command, the same files, and storage that all"
        " of them mount for its folder"
      )


def everyone(ours: Shaped[np.ndarray, "*F"]) -> Shaped[np.ndarray, "P *F"]:
  """What each process has."""
  if jax.process_count() == 1:
    return ours[None]
  return multihost_utils.process_allgather(ours)


class Agreement:
  """What any process was told, known to all of them after the same step.

  Each step asks for the largest number of all, by a collective on a scalar, and
  reads that of the step before: the devices always have work ahead of them, and
  all processes stop one step later.
  """

  def __init__(self, mesh: Mesh | None):
    self.mesh = mesh
    self.largest = None
    if mesh is not None and jax.process_count() > 1:
      whole = NamedSharding(mesh, P())
      self.largest = jax.jit(jnp.max, out_shardings=whole)
    self.asked = None

  def __call__(self, number: int) -> int:
    """The largest `number` of the step before; alone, `number` itself."""
    if self.mesh is None or self.largest is None:
      return number
    where = NamedSharding(self.mesh, P(self.mesh.axis_names))
    ours = lambda _: np.array([number], np.int32)
    numbers = jax.make_array_from_callback((self.mesh.size,), where, ours)
    before, self.asked = self.asked, self.largest(numbers)  # i32[N] -> i32[]
    return 0 if before is None else int(before)
