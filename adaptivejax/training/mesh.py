# SPDX-License-Identifier: Apache-2.0
"""The mesh of a run, and where each array of its state lies on it.

Five axes, of which most are of size 1:

    data      rows of the batch; parameters are whole on each device of it
    fsdp      rows of the batch, and a part of every large parameter
    expert    rows of the batch, and experts
    seq       tokens of a sequence
    model     heads, hidden features and vocabulary

A parameter's place is a rule: the first whose regular expression is found in
its path says over which mesh axes its last axes lie.  The optimizer's moments
lie where their parameters do.  Where items lie, adaptive operations say
themselves (`core.per_device`).

Axes: B batch, S context + 1, the bytes of a window.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from adaptivejax.core.per_device import BATCH_AXES, TOKEN_AXIS, WIDTH_AXIS

AXES = *BATCH_AXES, TOKEN_AXIS, WIDTH_AXIS
Axis = str | None
Rule = tuple[str, tuple[Axis, ...]]

RULES: tuple[Rule, ...] = (
  (r"router/", ()),
  (r"embedding$", ("model", "fsdp")),
  (r"^head/kernel$", ("fsdp", "model")),
  (r"attention/query/kernel$", ("fsdp", "model")),
  (r"attention/key_value/kernel$", ("fsdp", None)),
  (r"attention/out/kernel$", ("model", "fsdp")),
  (r"experts/(up|gate)/kernel$", ("expert", "fsdp", "model")),
  (r"experts/down/kernel$", ("expert", "model", "fsdp")),
  (r"(up|gate)/kernel$", ("fsdp", "model")),
  (r"down/kernel$", ("model", "fsdp")),
)
"""Kernels are [in, out]; keys and values of all heads are on each device."""


@dataclass(frozen=True)
class MeshConfig:
  """How many devices along each axis; all static."""

  data: int = 1
  """Devices over which the batch is split; -1 for all that are left."""

  fsdp: int = 1
  """Over which the batch and the parameters are split."""

  expert: int = 1
  """Over which the batch and the experts are split."""

  seq: int = 1
  """Over which the tokens of a sequence are split."""

  model: int = 1
  """Over which heads, hidden features and the vocabulary are split."""

  rules: tuple[Rule, ...] = ()
  """`(regular expression, mesh axes of the last axes)`, before `RULES`."""

  def __post_init__(self):
    """Refuses sizes that are none."""
    for name in AXES:
      size = getattr(self, name)
      if size < 1 and not (name == "data" and size == -1):
        raise ValueError(f"mesh.{name}={size} must be at least 1 device")
    for pattern, axes in self.rules:
      try:
        re.compile(pattern)
      except re.error as error:
        raise ValueError(
          f"the rule {pattern!r} is no regular expression: {error}"
        ) from None
      named = [a for a in axes if a is not None]
      if isinstance(axes, str) or len({*named}) < len(named):
        raise ValueError(
          f"the rule {pattern!r} must give a tuple of different mesh axes, or"
          f" None, for the last axes of an array; got {axes!r}"
        )
      unknown = {*named} - set(AXES)
      if unknown:
        raise ValueError(
          f"the rule {pattern!r} names {sorted(unknown)}: mesh axes are {AXES}"
        )

  def sizes(self, devices: int) -> dict[str, int]:
    """Devices along each axis, of so many.

    Raises:
      ValueError: they do not make up all devices.
    """
    sizes = {name: getattr(self, name) for name in AXES}
    rest = math.prod(size for size in sizes.values() if size > 0)
    if sizes["data"] == -1:
      sizes["data"] = max(devices // rest, 1)
    if math.prod(sizes.values()) != devices:
      asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
      raise ValueError(
        f"the mesh {asked} is of {math.prod(sizes.values())} devices, and there"
        f" are {devices}: their product must be that; data=-1 takes the rest"
      )
    return sizes


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh over `devices`, all if not given; its axes are `Auto`.

  Between slices of TPUs, whose network is slow, only `data` goes: gradients.

  Raises:
    ValueError: the sizes do not make up the devices, or `data` not the slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = config.sizes(len(devices))
  kinds, shape = (AxisType.Auto,) * len(sizes), tuple(sizes.values())
  if devices[0].platform == "tpu" and slices_of(devices) > 1:
    return Mesh(over_slices(sizes, devices), tuple(sizes), axis_types=kinds)
  try:
    grid = mesh_utils.create_device_mesh(shape, devices)
  except NotImplementedError:  # a mesh axis is a part of one of the torus
    grid = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return Mesh(grid, tuple(sizes), axis_types=kinds)


def slices_of(devices: Sequence[Any]) -> int:
  """How many slices the devices are of."""
  return len({getattr(device, "slice_index", 0) for device in devices})


def over_slices(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
  """The devices by mesh axis, `data` outermost over their slices."""
  slices = slices_of(devices)
  if sizes["data"] % slices:
    raise ValueError(
      f"mesh.data={sizes['data']} must be a multiple of the {slices} slices:"
      " between them only gradients should travel"
    )
  inside = dict(sizes) | {"data": sizes["data"] // slices}
  between = {name: slices if name == "data" else 1 for name in sizes}
  return mesh_utils.create_hybrid_device_mesh(
    tuple(inside.values()),
    tuple(between.values()),
    devices,
    allow_split_physical_axes=True,
  )


def check_batch(
  rows: int,
  mesh: Mesh | AbstractMesh,
  tokens: int | None = None,
  parts: int = 1,
) -> None:
  """Raises ValueError unless the mesh divides what an update computes at once.

  Args:
    rows: of a batch.
    mesh: whose devices share them.
    tokens: of a row, if they are split too.
    parts: of the batch, one after the other (`optimizer.accumulate`).
  """
  split = math.prod(mesh.shape[name] for name in BATCH_AXES)
  if rows % (split * parts):
    one_by_one = f" times optimizer.accumulate={parts}" if parts > 1 else ""
    raise ValueError(
      f"data.batch={rows} must be a multiple of {split * parts}: the {split}"
      " devices over which the mesh splits it (data x fsdp x expert)"
      f"{one_by_one}"
    )
  if tokens is not None and tokens % mesh.shape[TOKEN_AXIS]:
    raise ValueError(
      f"data.context={tokens} must be a multiple of mesh.{TOKEN_AXIS}="
      f"{mesh.shape[TOKEN_AXIS]}, the devices over which it splits a sequence:"
      " take another context, or fewer devices along it"
    )


def batch_spec() -> P:
  """Where i32[B, S] lies: S is odd, so its tokens are split when embedded."""
  return P(BATCH_AXES)


class Placed(NamedTuple):
  """An array of the state, and where it lies.

  Attributes:
    path: its name, as `params/layers/mlp/up/kernel`.
    shape: of the whole.
    dtype: of its elements.
    spec: mesh axes by axis.
    rule: the expression that placed it, None if nothing did.
    bytes: of it on each device.
  """

  path: str
  shape: tuple[int, ...]
  dtype: Any
  spec: P
  rule: str | None
  bytes: int


def place(
  state: PyTree, config: MeshConfig, mesh: Mesh | AbstractMesh
) -> list[Placed]:
  """Where every array of `state` (arrays or their shapes) lies, in its order.

  Raises:
    ValueError: a mesh axis does not divide an axis that a rule gives it; a rule
      of the config is found in no path.
  """
  rules = [(re.compile(p), axes) for p, axes in (*config.rules, *RULES)]
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  placed = []
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    placed.append(_placed(name, leaf, rules, dict(mesh.shape)))
  used = {p.rule for p in placed}
  for pattern, _ in config.rules:
    if pattern not in used:
      raise ValueError(
        f"the rule {pattern!r} places nothing: no parameter's path matches it"
        " first. `adaptivejax compile CONFIG --explain` lists them"
      )
  return placed


def shardings(
  state: PyTree, config: MeshConfig, mesh: Mesh | AbstractMesh
) -> PyTree:
  """`place`, as a pytree of `NamedSharding`s like `state`."""
  found = [NamedSharding(mesh, p.spec) for p in place(state, config, mesh)]
  return jax.tree.unflatten(jax.tree.structure(state), found)


def _placed(name, leaf, rules, mesh: Mapping[str, int]) -> Placed:
  shape, size = tuple(leaf.shape), np.dtype(leaf.dtype).itemsize
  found = ((p.pattern, axes) for p, axes in rules if p.search(_bare(name)))
  rule, axes = next(found, (None, ()))
  lead = len(shape) - len(axes)
  if lead < 0:
    raise ValueError(
      f"the rule {rule!r} names {len(axes)} axes, and {name} has {len(shape)}"
    )
  spec = P(*[None] * lead, *_dividing(name, shape[lead:], axes, mesh))
  devices = math.prod(mesh[a] for a in spec if a is not None)
  total = math.prod(shape) * size
  return Placed(name, shape, leaf.dtype, spec, rule, total // devices)


def _bare(name: str) -> str:
  """The path of a parameter; that of its moments ends in it."""
  return re.sub(r"^(params|optimizer(/\d+)*(/(mu|nu))?|step)/", "", name)


def _dividing(name, shape, axes, mesh) -> Iterator[Axis]:
  for size, axis in zip(shape, axes, strict=True):
    if axis is None or mesh[axis] == 1:
      yield None
    elif size % mesh[axis]:
      raise ValueError(
        f"mesh.{axis}={mesh[axis]} does not divide an axis of {size} of {name},"
        f" {shape}: take another mesh, or a rule that leaves it whole"
      )
    else:
      yield axis
