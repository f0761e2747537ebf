# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: metadata, and where its tensors are.

A file is the magic, a version, two counts, pairs of key and value, one record
for each tensor, and, aligned, the data.  The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Every length is checked against the file before anything of it is read.
"""

import itertools
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
METADATA_BYTES = 200_000_000
"""Of all that comes before the data, at most: it becomes lists of Python."""

NUMBERS = {
  0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
  10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""Types of values by their number."""

_LENGTH = struct.Struct("<Q").unpack_from


class Stored(NamedTuple):
  """A tensor as it is stored."""

  shape: tuple[int, ...]
  """Slowest axis first, [O, I] of a linear map; the file has it reversed."""
  kind: Any
  """A `gguf.GGMLQuantizationType`."""
  data: np.ndarray
  """Its bytes, mapped and not read, u8[N]."""


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
  """`(metadata, tensors)` of a file, by name (needs the extra `gguf`).

  Raises:
    ValueError: anything that does not fit the format or the file's size.
  """
  with open(path, "rb") as file:
    if file.read(4) != MAGIC:
      raise ValueError(f"{path} is no GGUF file: it does not begin with GGUF.")
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  cursor = _Cursor(view, path)
  cursor.at = 4
  version = cursor.number("<u4")
  if version not in (2, 3):
    raise ValueError(f"{path} is GGUF of version {version}; only 2 and 3.")
  tensors, pairs = cursor.number("<u8"), cursor.number("<u8")
  metadata: dict[str, Any] = {}
  for _ in range(pairs):
    key = cursor.string()
    if key in metadata:
      raise ValueError(f"{path}: the key {key!r} is there twice.")
    metadata[key] = cursor.value(key)
  records: dict[str, tuple[tuple[int, ...], int, int]] = {}
  for _ in range(tensors):
    name = cursor.string()
    if name in records:
      raise ValueError(f"{path}: the tensor {name!r} is there twice.")
    axes = cursor.number("<u4")
    shape = tuple(int(n) for n in cursor.numbers("<u8", axes)[::-1])
    records[name] = shape, cursor.number("<u4"), cursor.number("<u8")
  align = metadata.get("general.alignment", 32)
  if type(align) is not int or align < 1 or align & (align - 1):
    raise ValueError(f"{path}: general.alignment={align!r} is no power of two.")
  start = -(-cursor.at // align) * align
  return metadata, _tensors(view, records, start, align, path)


def _tensors(view, records, start: int, align: int, path) -> dict[str, Stored]:
  """The tensors, none of which may overlap another or leave the file."""
  import gguf

  found, ends = {}, []
  for name, (shape, number, offset) in records.items():
    where = f"{path}: tensor {name!r}"
    try:
      kind = gguf.GGMLQuantizationType(number)
      block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
      raise ValueError(f"{where} is of an unknown type, {number}.") from None
    if not shape or len(shape) > 4 or min(shape) < 1 or shape[-1] % block:
      raise ValueError(f"{where} cannot have the shape {shape} as {kind.name}.")
    count = math.prod(shape) // block * size
    begin = start + offset
    if offset % align or begin + count > len(view):
      raise ValueError(
        f"{where}: {count} bytes at offset {offset} are out of range or not"
        f" aligned to {align}. The file is truncated, or its header wrong."
      )
    data = np.frombuffer(view, np.uint8, count, begin)
    found[name] = Stored(shape, kind, data)
    ends.append((begin, begin + count, where))
  ends.sort()
  for (_, end, _), (begin, _, where) in itertools.pairwise(ends):
    if begin < end:
      raise ValueError(f"{where} overlaps the one before it.")
  return found


class _Cursor:
  """Reads on from a place in a file, never past its end."""

  def __init__(self, view: mmap.mmap, path: Path):
    self.view, self.path, self.at = view, path, 0

  def take(self, count: int) -> int:
    """Moves on; returns where it was."""
    if count > len(self.view) - self.at:
      raise self.short(self.at)
    if self.at + count > METADATA_BYTES:
      raise ValueError(
        f"{self.path}: what comes before the tensors has over {METADATA_BYTES}"
        " bytes, which no vocabulary needs: it is not read."
      )
    self.at += count
    return self.at - count

  def short(self, at: int) -> ValueError:
    """The error for a length that leads out of the file, to be raised."""
    return ValueError(
      f"{self.path} is truncated, or its header wrong: what is said at byte"
      f" {at} of {len(self.view)} leads beyond the end."
    )

  def numbers(self, kind: str, count: int) -> np.ndarray:
    """That many numbers."""
    dtype = np.dtype(kind)
    at = self.take(count * dtype.itemsize)
    return np.frombuffer(self.view, dtype, count, at)

  def number(self, kind: str) -> Any:
    """One number, as Python's."""
    return self.numbers(kind, 1)[0].item()

  def strings(self, count: int) -> list[str]:
    """That many texts, each a length and UTF-8.

    Vocabularies are long, so that this loop is plain.
    """
    found, view, at, size = [], self.view, self.at, len(self.view)
    for _ in range(count):
      end = at + 8
      if end > size or (after := end + _LENGTH(view, at)[0]) > size:
        raise self.short(at)
      found.append(view[end:after])
      at = after
    self.take(at - self.at)
    try:
      return [text.decode("utf-8") for text in found]
    except UnicodeDecodeError as error:
      raise ValueError(f"{self.path}: a text is no UTF-8: {error}") from None

  def string(self) -> str:
    """One text."""
    return self.strings(1)[0]

  def value(self, key: str) -> Any:
    """A number, a text, or a list of one of them."""
    kind = self.number("<u4")
    if kind == STRING:
      return self.string()
    if kind in NUMBERS:
      return self.number(NUMBERS[kind])
    if kind == ARRAY:
      kind, count = self.number("<u4"), self.number("<u8")
      if kind == STRING:
        return self.strings(count)
      if kind in NUMBERS:
        return self.numbers(NUMBERS[kind], count).tolist()
    raise ValueError(f"{self.path}: {key} is of an unknown type, {kind}.")
