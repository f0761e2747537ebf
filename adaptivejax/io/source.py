# SPDX-License-Identifier: Apache-2.0
"""The tensors of a checkpoint by name, whatever files they are in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from adaptivejax.io.header import Entry, read_header
from adaptivejax.untrusted import own, read_bytes, read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

BESIDE = (
  "chat_template.jinja",
  "generation_config.json",
  "merges.txt",
  "preprocessor_config.json",
  "special_tokens_map.json",
  "tokenizer.json",
  "tokenizer.model",
  "tokenizer_config.json",
  "vocab.json",
  "vocab.txt",
)
"""Files that go with the weights; kept as they are, never run."""

CONFIG_BYTES = 10_000_000
"""Of a config or an index at most."""

BESIDE_BYTES = 200_000_000
"""Of one of these files at most: five times the largest tokenizer there is."""


class Spec(NamedTuple):
  """Shape and type of a tensor, known without reading it."""

  shape: tuple[int, ...]
  dtype: np.dtype


class Source:
  """A checkpoint that is open.

  Attributes:
    where: its path, for errors.
    config: what its `config.json` says, or would say.
    files: `BESIDE`, by name.
    specs: of its tensors, by name.
  """

  where: str
  config: dict[str, Any]
  files: dict[str, bytes]
  specs: Mapping[str, Spec]

  def read(self, name: str) -> np.ndarray:
    """The values of a tensor."""
    raise ValueError(f"{type(self).__name__} does not say how to read {name}.")


class Folder(Source):
  """A folder with `config.json` and safetensors, one file or several.

  Raises:
    ValueError: a file is missing, malformed, or elsewhere.
  """

  def __init__(self, path: Path):
    self.where = str(path)
    self.config = read_object(path / "config.json", CONFIG_BYTES)
    self.files = {
      name: read_bytes(path / name, BESIDE_BYTES)
      for name in BESIDE
      if (path / name).is_file()
    }
    self.paths: dict[str, Path] = {}
    self.specs: Mapping[str, Spec] = {}
    for file, names in _shards(path).items():
      entries = read_header(file)
      _check_index(file, entries, names)
      self.paths |= dict.fromkeys(entries, file)
      specs = {n: Spec(e.shape, e.dtype) for n, e in entries.items()}
      self.specs = {**self.specs, **specs}
    self._open: dict[Path, Any] = {}

  def read(self, name: str) -> np.ndarray:
    """The values of a tensor."""
    path = self.paths[name]
    try:
      if path not in self._open:
        self._open[path] = safetensors.safe_open(path, framework="numpy")
      return self._open[path].get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(f"{path}: tensor {name!r}: {error}") from error


def _shards(path: Path) -> dict[Path, set[str] | None]:
  """Files of a folder and the tensors that each should hold, if told."""
  single, index = path / SINGLE, path / INDEX
  if single.is_file() and index.is_file():
    raise ValueError(f"{path} holds both {SINGLE} and {INDEX}: which one?")
  if single.is_file():
    return {single: None}
  if not index.is_file():
    other = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
    hint = f" {other[0]} may be a pickle: it is not opened." if other else ""
    raise ValueError(f"{path} holds neither {SINGLE} nor {INDEX}.{hint}")
  files: dict[Path, set[str] | None] = {}
  table = read_object(index, CONFIG_BYTES).get("weight_map")
  if not isinstance(table, dict) or not table:
    raise ValueError(f"{index} has no `weight_map`.")
  for name, file in table.items():
    shard = _inside(path, file, f"{index}: tensor {name!r}")
    names = files.setdefault(shard, set())
    assert names is not None
    names.add(name)
  return files


_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def _inside(folder: Path, file: Any, where: str) -> Path:
  """A file of the folder itself."""
  plain = isinstance(file, str) and file.endswith(".safetensors")
  if not plain or set(file) & set("/\\\0:") or file.startswith("."):
    raise ValueError(f"{where} is in {file!r}, no file of this folder.")
  path = folder / file
  if not path.is_file():
    raise ValueError(f"{where} is in {file!r}, which is missing.")
  return own(path)


def _check_index(
  file: Path, entries: Mapping[str, Entry], names: set[str] | None
) -> None:
  """The index tells the same tensors as the file."""
  if names is None:
    return
  if missing := names - set(entries):
    raise ValueError(
      f"{file}: tensor {min(missing)!r} of the index is missing."
    )
  if extra := set(entries) - names:
    raise ValueError(f"{file}: tensor {min(extra)!r} is not in the index.")
