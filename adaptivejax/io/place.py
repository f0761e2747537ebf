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
from jax.sharding import NamedSharding, PartitionSpec, Sharding
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
    shardings = jax.sharding.SingleDeviceSharding(jnp.zeros(()).device)
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
  array = None
  for start, block in blocks:
    if block.shape == leaf.shape:
      return _put(block, leaf.dtype, sharding)
    if array is None:
      array = _zeros(leaf.shape, leaf.dtype, sharding)
    there = _piece_sharding(sharding, leaf.shape, block.shape)
    at = np.asarray(start, np.int32)
    array = _writer(sharding)(array, _put(block, leaf.dtype, there), at)
  assert array is not None
  return array


def _put(block: np.ndarray, dtype, sharding: Sharding) -> Array:
  """To devices, each its share, in the type it is to have."""
  share = lambda index: np.ascontiguousarray(block[index].astype(dtype))
  return jax.make_array_from_callback(block.shape, sharding, share)


def _piece_sharding(sharding, whole, piece) -> Sharding:
  """Spread as the leaf is, along the axes that a block has all of."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  spec = (*sharding.spec, *[None] * (len(whole) - len(sharding.spec)))
  kept = (s if w == p else None for s, w, p in zip(spec, whole, piece))
  return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _zeros(shape, dtype, sharding) -> Array:
  make = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
  return make()


@functools.lru_cache(maxsize=64)
def _writer(sharding):
  """Writes a block into an array in its place, which is given up."""
  return jax.jit(
    lambda array, block, start: jax.lax.dynamic_update_slice(
      array, block, tuple(start)
    ),
    donate_argnums=0,
    out_shardings=sharding,
  )
