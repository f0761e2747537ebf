# SPDX-License-Identifier: Apache-2.0
"""Tensors onto devices, one at a time.

A leaf is laid out on its devices, empty, and tensors are written into it one
after the other; the host holds one tensor, and a device its share of the leaf.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jaxtyping import Array

Shardings = Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding] | Any
"""One for all leaves, a function of a leaf's path and shape, or a pytree."""


def shardings_of(
  leaves: dict[str, jax.ShapeDtypeStruct], shardings: Shardings | None
) -> dict[str, Sharding]:
  """The sharding of each leaf by its path; the default device if not given.

  Raises:
    ValueError: a leaf without, or one that does not divide its leaf.
  """
  if shardings is None:
    shardings = SingleDeviceSharding(jnp.zeros(()).device)
  if isinstance(shardings, Sharding):
    found: dict[str, Any] = dict.fromkeys(leaves, shardings)
  elif jax.tree.structure(shardings) == jax.tree.structure(0):  # no pytree
    found = {path: shardings(path, leaf) for path, leaf in leaves.items()}
  else:
    found = paths_of(shardings, is_leaf=lambda s: isinstance(s, Sharding))
  for path, leaf in leaves.items():
    sharding = found.get(path)
    if not isinstance(sharding, Sharding):
      raise ValueError(f"no sharding for {path!r}; got {sharding!r}.")
    try:
      sharding.shard_shape(leaf.shape)
    except ValueError as error:
      raise ValueError(f"the sharding of {path!r}: {error}") from error
  return {path: found[path] for path in leaves}


def paths_of(tree: Any, **settings) -> dict[str, Any]:
  """The leaves of a module, or of a pytree like it, by path."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree, **settings)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
  return {name(path).removesuffix(".value"): leaf for path, leaf in leaves}


def fill(
  leaf: jax.ShapeDtypeStruct,
  sharding: Sharding,
  blocks: Iterable[tuple[tuple[int, ...], np.ndarray]],
) -> Array:
  """An array on its devices, from its blocks.

  Args:
    leaf: its shape and type.
    sharding: where it goes.
    blocks: `(start, block)`: where a block begins, and the block, with as many
      axes as the leaf; together they cover it.
  """
  regions = sharding.addressable_devices_indices_map(leaf.shape)
  shards = [
    _Shard(*item, leaf, sharding.memory_kind) for item in regions.items()
  ]
  for start, block in blocks:
    for shard in shards:
      shard.write(start, block)
  return jax.make_array_from_single_device_arrays(
    leaf.shape, sharding, [shard.array for shard in shards]
  )


class _Shard:
  """The part of a leaf that one device has."""

  def __init__(self, device, region, leaf, memory_kind):
    spans = [s.indices(n)[:2] for s, n in zip(region, leaf.shape)]
    self.low, self.high = np.asarray(spans, int).reshape(-1, 2).T
    self.dtype = leaf.dtype
    self.place = SingleDeviceSharding(device, memory_kind=memory_kind)
    self.array: Any = None

  def write(self, start: tuple[int, ...], block: np.ndarray) -> None:
    """Takes what it has to have of a block, in the type it is to have."""
    low = np.maximum(self.low, start)
    high = np.minimum(self.high, np.add(start, block.shape))
    if (low >= high).any():
      return
    cut = zip(low - start, high - start)
    part = block[tuple(slice(a, b) for a, b in cut)].astype(self.dtype)
    part = jax.device_put(np.ascontiguousarray(part), self.place)
    shape = tuple(self.high - self.low)
    if part.shape == shape:
      self.array = part
      return
    if self.array is None:
      self.array = jnp.zeros(shape, self.dtype, device=self.place)
    self.array = _written(self.array, part, low - self.low)


@functools.partial(jax.jit, donate_argnums=0)
def _written(array, part, start):
  """The array with a part of it replaced; it is given up."""
  return jax.lax.dynamic_update_slice(array, part, tuple(start))
