# SPDX-License-Identifier: Apache-2.0
"""The mesh of a config, and the rules of its arrays."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from adaptivejax.training.chips import devices_of
from adaptivejax.training.mesh import (
  AXES,
  MeshConfig,
  check_batch,
  over_slices,
  place,
)


def abstract(**sizes):
  sizes = {name: sizes.get(name, 1) for name in AXES}
  kinds = (AxisType.Auto,) * len(AXES)
  return AbstractMesh(tuple(sizes.values()), AXES, axis_types=kinds)


def nested(path, shape):
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  for name in reversed(path.split("/")):
    leaf = {name: leaf}
  return leaf


def test_data_takes_the_devices_that_are_left():
  assert MeshConfig(data=-1, model=2).sizes(8)["data"] == 4
  with pytest.raises(ValueError, match="there are 8"):
    MeshConfig(data=3).sizes(8)
  with pytest.raises(ValueError, match="there are 6"):
    MeshConfig(data=-1, model=4).sizes(6)


def chips(slices, each):
  return [
    SimpleNamespace(
      slice_index=i, id=i * each + j, platform="none", device_kind="none"
    )
    for j in range(each)  # neighbours in the list are of different slices
    for i in range(slices)
  ]


def test_between_slices_only_data_goes():
  sizes = MeshConfig(data=4, model=2).sizes(8)
  mesh = over_slices(sizes, chips(2, 4))
  assert mesh.shape == tuple(sizes[axis] for axis in AXES)
  slices = np.vectorize(lambda chip: chip.slice_index)(mesh)
  for data in range(4):
    assert (slices[data] == data // 2).all()
  with pytest.raises(ValueError, match="data=1 must be a multiple of the 2 sl"):
    over_slices(MeshConfig(fsdp=8).sizes(8), chips(2, 4))


@pytest.mark.parametrize(
  ("path", "shape", "spec"),
  [
    ("params/embedding", (256, 64), ("model", "fsdp")),
    ("params/layers/mlp/up/kernel", (4, 64, 128), (None, "fsdp", "model")),
    ("params/layers/mlp/down/kernel", (4, 128, 64), (None, "model", "fsdp")),
    (
      "optimizer/1/0/mu/layers/mlp/experts/down/kernel",
      (4, 8, 128, 64),
      (None, "expert", "model", "fsdp"),
    ),
    ("params/layers/mlp/router/gate/kernel", (4, 64, 8), (None, None, None)),
    ("params/layers/norm_mlp/scale", (4, 64), (None, None)),
  ],
)
def test_rules(path, shape, spec):
  mesh = abstract(fsdp=2, expert=2, model=4)
  (found,) = place(nested(path, shape), MeshConfig(), mesh)
  assert tuple(found.spec) == spec
  parts = np.prod([dict(mesh.shape)[a] for a in spec if a])
  assert found.bytes == np.prod(shape) * 4 / parts


def test_rules_of_a_config_come_first():
  rules = (("up/kernel", (None, None)),)
  config = MeshConfig(rules=rules)
  (found,) = place(nested("mlp/up/kernel", (8, 8)), config, abstract(fsdp=2))
  assert tuple(found.spec) == (None, None) and found.rule == "up/kernel"


@pytest.mark.parametrize(
  ("config", "path", "shape", "says"),
  [
    ({}, "mlp/up/kernel", (7, 8), "fsdp=2 does not divide an axis of 7 of mlp"),
    ({"rules": (("nothing", ("fsdp",)),)}, "a", (8,), "places nothing"),
    ({"rules": (("a", ("fsdp", "model")),)}, "a", (8,), "names 2 axes"),
  ],
)
def test_what_does_not_fit_is_named(config, path, shape, says):
  with pytest.raises(ValueError, match=says):
    place(nested(path, shape), MeshConfig(**config), abstract(fsdp=2))


def test_what_does_not_divide_a_batch():
  mesh = abstract(data=2, expert=2, seq=4)
  check_batch(8, mesh, 64)
  with pytest.raises(ValueError, match="data.batch=6 must be a multiple of 4"):
    check_batch(6, mesh, 64)
  with pytest.raises(ValueError, match="multiple of 8.*accumulate=2"):
    check_batch(4, mesh, 64, 2)
  with pytest.raises(ValueError, match="data.context=66 .* mesh.seq=4"):
    check_batch(8, mesh, 66)


def test_bad_configs():
  with pytest.raises(ValueError, match="mesh axes are"):
    MeshConfig(rules=(("a", ("rows",)),))
  with pytest.raises(ValueError, match="mesh.model=0"):
    MeshConfig(model=0)


@pytest.mark.parametrize(
  ("topology", "says"),
  [
    ("v5e", "CHIP:SHAPE"),
    ("v99:2x2", "CHIP:SHAPE"),
    ("cpu:many", "cpu:COUNT"),
    ("cpu:4096", "JAX_NUM_CPU_DEVICES"),
    ("h100:9", "1 to 8"),
  ],
)
def test_topologies_that_do_not_exist(topology, says):
  with pytest.raises(ValueError, match=says):
    devices_of(topology)
