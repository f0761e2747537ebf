# SPDX-License-Identifier: Apache-2.0
"""A trained model taken apart into layers, and put together again.

Axes: L layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adaptivejax.nn.block import Block, Group, Layer
from adaptivejax.nn.stack import layer_at, layer_count

Model = Any
"""One that stacks its `layers`, such as a `models.DecoderLM`."""


def map_layers(model: Model, change: Callable[[Layer, int], Layer]) -> Model:
  """The model with `change(layer, l)` in the place of every stacked layer.

  All changed layers must have the same structure.  The model itself stays as it
  is; what does not change is shared, not copied.
  """
  total = layer_count(model.layers)
  return _with(
    model, [change(layer_at(model.layers, l), l) for l in range(total)]
  )


def map_mlps(
  model: Model, change: Callable[[nnx.Module, int], nnx.Module]
) -> Model:
  """The model with `change(mlp, l)` for the feed-forward half of layer l."""
  if not isinstance(model.layers, Block):
    raise ValueError(
      "feed-forward layers are changed in models that stack `Block`s; this one"
      f" stacks {type(model.layers).__name__}."
    )
  total = layer_count(model.layers)
  new = jax.tree.map(lambda a: a, model)  # a copy
  made = [change(layer_at(model.layers.mlp, l), l) for l in range(total)]
  new.layers.mlp = _stack(made)
  return new


def group_layers(
  model: Model, size: int, change: Callable[[Sequence[Layer]], Sequence[Layer]]
) -> Model:
  """The model with `size` layers in a row as one `nn.Group`, after `change`."""
  total = layer_count(model.layers)
  if size < 1 or total % size:
    raise ValueError(
      f"groups of {size=} layers must divide the {total} there are."
    )
  each = [layer_at(model.layers, l) for l in range(total)]
  rows = [each[l : l + size] for l in range(0, total, size)]
  return _with(model, [Group(change(row)) for row in rows])


def _with(model: Model, layers: Sequence[Layer]) -> Model:
  new = jax.tree.map(lambda a: a, model)  # a copy
  new.layers = _stack(layers)
  return new


def _stack(modules):
  return jax.tree.map(lambda *a: jnp.stack(a), *modules)
