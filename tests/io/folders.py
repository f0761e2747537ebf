# SPDX-License-Identifier: Apache-2.0
"""Folders of models to be read, and to be spoilt."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

GOLDENS = Path(__file__).parents[1] / "goldens" / "pretrained"
CASES = sorted(path.name for path in GOLDENS.iterdir())


def golden(name):
  """What transformers computed, by name."""
  with np.load(GOLDENS / name / "golden.npz") as arrays:
    return dict(arrays)


def copy_of(name, path):
  """A folder like that of a golden, to be changed."""
  return Path(shutil.copytree(GOLDENS / name, path / name))


def config_of(folder):
  return json.loads((folder / "config.json").read_text())


def configure(folder, **fields):
  """Sets fields of the config."""
  text = json.dumps(config_of(folder) | fields)
  (folder / "config.json").write_text(text)


def tensors_of(folder):
  return load_file(folder / "model.safetensors")


def store(folder, tensors):
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def raw(folder, header, data, *, length=None):
  """Writes a file of that header, a dict or bytes, and data."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  whole = length.to_bytes(8, "little") + text + data
  (folder / "model.safetensors").write_bytes(whole)


def parts(folder):
  """`(header, data)` of its file."""
  whole = (folder / "model.safetensors").read_bytes()
  length = int.from_bytes(whole[:8], "little")
  return json.loads(whole[8 : 8 + length]), whole[8 + length :]
