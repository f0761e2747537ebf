# SPDX-License-Identifier: Apache-2.0
"""The header of a safetensors file, read and checked before anything else.

A file is 8 bytes, the length of the header, little-endian; the header, a JSON
object of `name: {dtype, shape, data_offsets}`, with `__metadata__` of strings;
and the data, which the tensors cover without holes or overlap.  The format:
https://github.com/huggingface/safetensors, README, "Format".
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from adaptivejax.untrusted import own, parse_object

LONGEST = 100_000_000
"""Bytes of a header at most, as in the library."""

DTYPES = {
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
  "F32": np.dtype(np.float32),
}
"""What weights may be, by its name in the file."""

BESIDES = {"I64": np.dtype(np.int64)}
"""What else may lie there, if it is no weight: positions that count up."""

FOREIGN = {
  b"PK\x03\x04": "a zip archive, as `torch.save` writes: a pickle in disguise",
  b"\x80": "a pickle",
  b"GGUF": "a GGUF file: name it .gguf",
  b"\x89HDF": "an HDF5 file",
}
"""First bytes of what is no safetensors file; none is ever opened as one."""


class Entry(NamedTuple):
  """A tensor of a file: what the header says of it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  begin: int
  """First byte, counted from the end of the header."""
  end: int


def read_header(path: Path) -> dict[str, Entry]:
  """The tensors of a file by name; its data is not read.

  Raises:
    ValueError: anything that does not fit the format or the file's size.
  """
  size = os.path.getsize(own(path))
  with open(path, "rb") as file:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if size < 8 or length > min(LONGEST, size - 8):
      raise ValueError(f"{path}: {_what_instead(start, size, length)}")
    text = file.read(length)
  if len(text) < length:
    raise ValueError(f"{path} ends within its header.")
  where = f"the header of {path}"
  raw = parse_object(text, where)
  _check_metadata(raw.pop("__metadata__", {}), where)
  entries = {
    name: _entry(value, f"{path}: tensor {name!r}")
    for name, value in raw.items()
  }
  _check_cover(entries, size - 8 - length, path)
  return entries


def _what_instead(start: bytes, size: int, length: int) -> str:
  for magic, what in FOREIGN.items():
    if start.startswith(magic):
      return f"this is {what}, not safetensors. It was not opened."
  if size < 8:
    return f"{size} bytes are no safetensors file."
  if length > LONGEST:
    return (
      f"a header of {length} bytes is absurd: at most {LONGEST}. This is no"
      " safetensors file, or a broken one."
    )
  return f"truncated: the header alone has {length} bytes, the file {size}."


def _check_metadata(metadata: Any, where: str) -> None:
  strings = isinstance(metadata, dict) and all(
    isinstance(value, str) for value in metadata.values()
  )
  if not strings:
    raise ValueError(f"{where}: `__metadata__` must map strings to strings.")


def _entry(value: Any, where: str) -> Entry:
  wanted = {"dtype", "shape", "data_offsets"}
  if not isinstance(value, dict) or set(value) != wanted:
    raise ValueError(f"{where} must say {sorted(wanted)}; it says {value!r}.")
  dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
  if not isinstance(dtype, str) or dtype not in DTYPES | BESIDES:
    raise ValueError(
      f"{where} is of dtype {dtype!r}; weights are one of {[*DTYPES]}."
    )
  if not _counts(shape):
    raise ValueError(f"{where} has no shape: {shape!r}.")
  if not _counts(offsets) or len(offsets) != 2:
    raise ValueError(f"{where} has no two data_offsets: {offsets!r}.")
  entry = Entry(tuple(shape), (DTYPES | BESIDES)[dtype], *offsets)
  needed = math.prod(entry.shape) * entry.dtype.itemsize
  if entry.end - entry.begin != needed:
    raise ValueError(
      f"{where} of shape {entry.shape} and dtype {dtype!r} needs {needed}"
      f" bytes; data_offsets {offsets} hold {entry.end - entry.begin}."
    )
  return entry


def _counts(values: Any) -> bool:
  """Whether these are a list of numbers from 0 on; True is none."""
  return isinstance(values, list) and all(
    type(value) is int and value >= 0 for value in values
  )


def _check_cover(entries: dict[str, Entry], size: int, path: Path) -> None:
  """Tensors follow one another and fill the data."""
  at = 0
  for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
    where = f"{path}: tensor {name!r} at bytes {entry.begin}..{entry.end}"
    if entry.end > size:
      raise ValueError(
        f"{where} is out of range: the data has {size} bytes. The file is"
        " truncated, or its header wrong."
      )
    if entry.begin < at:
      raise ValueError(f"{where} overlaps the one before, which ends at {at}.")
    if entry.begin > at:
      raise ValueError(f"{where} leaves a hole: the one before ends at {at}.")
    at = entry.end
  if at != size:
    raise ValueError(
      f"{path}: {size - at} bytes after the last tensor belong to none."
    )
