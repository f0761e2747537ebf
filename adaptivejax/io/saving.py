# SPDX-License-Identifier: Apache-2.0
"""A model in the files of Hugging Face."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from adaptivejax.io.architectures import plan_of
from adaptivejax.io.fields import Fields
from adaptivejax.io.header import DTYPES
from adaptivejax.io.place import paths_of
from adaptivejax.io.pretrained import Pretrained
from adaptivejax.io.rows import (
  Plan,
  Row,
  out_of_order,
  pieces,
  portion,
  tensor_shape,
)
from adaptivejax.io.write import Tensor, write_folder


def save(
  model: Any,
  path: str | Path,
  *,
  like: Pretrained,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a model as Hugging Face does; `load` and transformers read it.

  Tensors have the names, shapes and experts of such files, and the type of the
  parameters: what `load` read as it was stored comes out bit for bit.  Budgets
  (`nn.Setting`) and looks are no weights and are not written.

  Args:
    model: of the same architecture as `like.model`, trained on or not.
    path: a folder that is not there yet; it appears when all is written.
    like: whose config, tokenizer and other files it gets.
    max_shard_bytes: of a file at most, unless a tensor alone is larger.

  Raises:
    ValueError: a parameter has no place in such files, has another shape than
      the config says, or is not all in this process; or there is a file.
  """
  if max_shard_bytes < 1:
    raise ValueError(f"{max_shard_bytes=} must be at least 1.")
  params = paths_of(nnx.state(model, nnx.Param))
  longest = max(n for leaf in params.values() for n in leaf.shape)
  where = "the config of `like`"
  plan = plan_of(Fields(like.config, where, longest, longest))
  shapes = jax.eval_shape(lambda: plan.make(nnx.Rngs(0)))
  wanted = paths_of(nnx.state(shapes, nnx.Param))
  for name in sorted(params.keys() | wanted.keys()):
    _check_parameter(name, params.get(name), wanted.get(name), like)
  tensors = [
    tensor
    for row in plan.forms[0]
    for tensor in _tensors(row, plan, params[row.leaf])
  ]
  types = {_stored(leaf.dtype) for leaf in params.values()}
  config = dict(like.config)
  for name in ("dtype", "torch_dtype"):
    if name in config and len(types) == 1:
      config[name] = min(types)
  write_folder(Path(path), tensors, config, like.files, max_shard_bytes)


def _stored(dtype: np.dtype) -> str:
  if dtype not in DTYPES.values():
    raise ValueError(f"weights are one of {[*DTYPES]}; got {dtype}.")
  return dtype.name


def _check_parameter(name: str, ours, wanted, like: Pretrained) -> None:
  kind = like.config["model_type"]
  if wanted is None:
    raise ValueError(
      f"the parameter {name!r} has no place in a file of {kind!r}: save the"
      " model that was loaded, or weights of it, and others elsewhere."
    )
  if ours is None:
    raise ValueError(f"the model has no parameter {name!r}, as {kind!r} has.")
  if ours.shape != wanted.shape:
    raise ValueError(
      f"the parameter {name!r} has shape {ours.shape}; the config of `like`"
      f" says {wanted.shape}."
    )
  if not ours.is_fully_addressable:
    raise ValueError(
      f"the parameter {name!r} is spread over several processes: gather it."
    )


def _tensors(row: Row, plan: Plan, leaf: jax.Array) -> Iterator[Tensor]:
  """The tensors of a row, fetched from devices when they are written."""
  shape = tensor_shape(row, leaf.shape)
  count = math.prod(shape)
  columns = portion(row.part, leaf.shape[-1])
  for piece in pieces(row, plan.counts):

    def fetch(index=piece.index):
      part = leaf
      for i in index:
        part = jax.lax.dynamic_index_in_dim(part, i, keepdims=False)
      return out_of_order(row, np.asarray(part)[..., columns])

    yield Tensor(piece.tensor, count, count * leaf.dtype.itemsize, fetch)
