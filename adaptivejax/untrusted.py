# SPDX-License-Identifier: Apache-2.0
"""Files from strangers: in their own folder, not too long, of one meaning.

Whatever is read of a run, a checkpoint, a model or a report passes through
here, or checks every length by itself as `io.header` and `io.gguf_header` do.
Nothing of it is ever run.  SECURITY.md says what is trusted instead.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def own(path: Path) -> Path:
  """`path`, if it is a regular file of its folder.

  Links must not lead out, but for those of the Hugging Face cache, from
  `snapshots/REVISION/` to `blobs/`.

  Raises:
    ValueError: there is no such file, or it is elsewhere.
  """
  if not path.is_file():
    raise ValueError(f"{path} is missing, or is no file.")
  folder = path.parent.resolve()
  homes = [folder]
  if folder.parent.name == "snapshots":
    homes.append(folder.parents[1] / "blobs")
  if path.resolve().parent not in homes:
    raise ValueError(
      f"{path} is a link out of this folder, which is not followed: put the"
      " file itself there."
    )
  return path


def read_bytes(path: Path, limit: int) -> bytes:
  """A file of its folder, of at most `limit` bytes.

  Raises:
    ValueError: it is longer, missing, or elsewhere.
  """
  with own(path).open("rb") as file:
    size = os.fstat(file.fileno()).st_size  # `read` makes room for all it asks
    data = file.read(min(size, limit) + 1)
  if len(data) > limit:
    raise ValueError(f"{path} is over {limit} bytes long: it is not read.")
  return data


def refuse_links(folder: Path) -> None:
  """Raises ValueError for a link in a folder, however deep."""
  for at, folders, files in os.walk(folder):
    inside = (Path(at) / name for name in (*folders, *files))
    for path in (folder, *inside):
      if path.is_symlink():
        raise ValueError(
          f"{path} is a link, and a checkpoint has none: put the file itself"
          " there, if you trust it."
        )


def read_object(path: Path, limit: int) -> dict[str, Any]:
  """The JSON object in a file of its folder; see `parse_object`."""
  return parse_object(read_bytes(path, limit), str(path))


def parse_object(
  text: bytes, where: str, *, finite: bool = True
) -> dict[str, Any]:
  """The JSON object that `text` is.

  Args:
    text: UTF-8.
    where: whose text this is, for errors.
    finite: refuse NaN and infinity, which JSON has not (and Python writes).

  Raises:
    ValueError: not JSON, not an object, a key twice, half a character.
  """
  try:
    value = json.loads(
      text.decode("utf-8"),
      object_pairs_hook=_object,
      parse_constant=_refuse if finite else None,
      parse_float=_finite if finite else None,
    )
    if b"\\u" in text:  # else there can be no half of a pair
      json.dumps(value, ensure_ascii=False).encode("utf-8")
  except RecursionError:
    raise ValueError(f"{where} nests too deeply to be meant.") from None
  except ValueError as error:  # of json, of unicode, and our own
    raise ValueError(f"{where} is not the JSON it should be: {error}") from None
  if not isinstance(value, dict):
    raise ValueError(
      f"{where} must hold a JSON object; it holds a {type(value).__name__}."
    )
  return value


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for key, value in pairs:
    if key in found:
      raise ValueError(f"the key {key!r} is there twice")
    found[key] = value
  return found


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    _refuse(text)
  return value


def _refuse(name: str) -> None:
  raise ValueError(f"{name} is no number of JSON")
