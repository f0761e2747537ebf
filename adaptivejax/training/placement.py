# SPDX-License-Identifier: Apache-2.0
"""The state and the batches of a run, put on its devices.

On one device nothing is said and arrays are where JAX puts them.  On a mesh the
state is made where it lies, no device ever holding all of it; each process
reads the rows of a batch that its devices hold, from the same order of the same
text, so a run is the same on any number of processes.

Axes: B batch, S context + 1, the bytes of a window.
"""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree

from adaptivejax.training.config import TrainConfig
from adaptivejax.training.data import Batch
from adaptivejax.training.mesh import (
  MeshConfig,
  batch_spec,
  check_batch,
  make_mesh,
  shardings,
)
from adaptivejax.training.step import (
  Join,
  TrainState,
  joining,
  parts,
  split,
)


class Placement(NamedTuple):
  """Where a run is.

  Attributes:
    mesh: its devices; None for the default one.
    shardings: of the state, in its form; None on one device.
  """

  mesh: Mesh | None
  shardings: TrainState | None

  def ambient(self) -> contextlib.AbstractContextManager:
    """Inside, adaptive operations find the mesh (`core.per_device`)."""
    if self.mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self.mesh)

  def batch(self, rows: Batch) -> Int[Array | np.ndarray, "B S"]:
    """A batch, each device holding its rows."""
    if self.mesh is None:
      return np.asarray(rows)
    where = NamedSharding(self.mesh, batch_spec())
    return jax.make_array_from_callback(rows.shape, where, rows.read)


def start(
  config: TrainConfig, optimizer: optax.GradientTransformation
) -> tuple[Placement, Join, TrainState]:
  """The placement, the function that makes the model, and the first state.

  Raises:
    ValueError: the mesh does not fit the devices, or a parameter (`mesh`).
  """
  build = lambda: config.build(nnx.Rngs(config.seed))
  alone = jax.process_count() == 1
  if alone and config.mesh == MeshConfig(rules=config.mesh.rules):
    join, params = split(build())
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    return Placement(None, None), join, state
  mesh = make_mesh(config.mesh)
  data, parts = config.data, config.optimizer.accumulate
  check_batch(data.batch, mesh, data.context, parts)
  make = lambda: _first(config, optimizer)
  state, rest = jax.eval_shape(make)
  where = shardings(state, config.mesh, mesh)
  whole = jax.tree.map(lambda _: NamedSharding(mesh, P()), rest)
  with jax.set_mesh(mesh):
    state, rest = jax.jit(make, out_shardings=(where, whole))()
  join = joining(jax.eval_shape(build), rest)
  return Placement(mesh, where), join, state


def abstract_start(
  config: TrainConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Join, TrainState]:
  """`(shardings, join, state)` on devices that need not be here.

  The state is of `ShapeDtypeStruct`s; only what is not trained is made.
  """
  make = lambda: _first(config, optimizer)
  state, _ = jax.eval_shape(make)
  where = shardings(state, config.mesh, mesh)
  rest = jax.jit(lambda: make()[1])()
  model = jax.eval_shape(lambda: config.build(nnx.Rngs(config.seed)))
  placed = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    state,
    where,
  )
  return where, joining(model, rest), placed


def _first(config, optimizer) -> tuple[TrainState, PyTree]:
  params, rest = parts(config.build(nnx.Rngs(config.seed)))
  return TrainState(jnp.int32(0), params, optimizer.init(params)), rest
