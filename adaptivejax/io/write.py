# SPDX-License-Identifier: Apache-2.0
"""A checkpoint onto disk, whole or not at all, as Hugging Face lays it out."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from adaptivejax.files import to_disk
from adaptivejax.io.source import INDEX, SINGLE


class Tensor(NamedTuple):
  """A tensor to be written: its size is known before its values."""

  name: str
  count: int
  """Of its values."""
  size: int
  """Of its bytes."""
  fetch: Callable[[], np.ndarray]


def write_folder(
  path: Path,
  tensors: Sequence[Tensor],
  config: Mapping[str, Any],
  files: Mapping[str, bytes],
  max_shard_bytes: int,
) -> None:
  """Writes a folder that was not there, or empty.

  The host holds the tensors of one file at a time.

  Raises:
    ValueError: there is something at `path`.
  """
  with _whole(path) as folder:
    shards = _shards(tensors, max_shard_bytes)
    table: dict[str, str] = {}
    for i, shard in enumerate(shards):
      name = SINGLE
      if len(shards) > 1:
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
      values = {t.name: np.ascontiguousarray(t.fetch()) for t in shard}
      save_file(values, folder / name, metadata={"format": "pt"})
      table |= dict.fromkeys(values, name)
    if len(shards) > 1:
      total = {
        "total_parameters": sum(t.count for t in tensors),
        "total_size": sum(t.size for t in tensors),
      }
      _dump(folder / INDEX, {"metadata": total, "weight_map": table})
    for name, content in files.items():
      (folder / name).write_bytes(content)
    _dump(folder / "config.json", config)


def _shards(tensors: Sequence[Tensor], most: int) -> list[list[Tensor]]:
  """Tensors in order, as many to a file as it holds; one at least."""
  shards: list[list[Tensor]] = [[]]
  size = 0
  for tensor in tensors:
    if shards[-1] and size + tensor.size > most:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.size
  return shards


def _dump(path: Path, values: Mapping[str, Any]) -> None:
  text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
  path.write_bytes((text + "\n").encode("utf-8"))


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
  """A folder beside `path` that takes its place once all is on disk."""
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f"{path} is there already: save under another name.")
  path.parent.mkdir(parents=True, exist_ok=True)
  made = tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent)
  folder = Path(made)
  try:
    yield folder
    for file in [*folder.iterdir(), folder]:
      to_disk(file)
    folder.chmod(0o777 & ~_umask())
    os.replace(folder, path)
    to_disk(path.parent)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise


def _umask() -> int:
  """What the user takes away from permissions."""
  mask = os.umask(0)
  os.umask(mask)
  return mask
