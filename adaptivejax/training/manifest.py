# SPDX-License-Identifier: Apache-2.0
"""The seal of a checkpoint: what is in its files, so that damage is found.

`SHA256SUMS`, in the format of coreutils, lists every other file of a folder:

    cd runs/NAME/checkpoints/STEP && sha256sum -c SHA256SUMS

It finds decay and cut files, not forgery: who can change a file can seal it.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from adaptivejax.files import to_disk, write_atomically

NAME = "SHA256SUMS"
LARGEST = 64 * 2**20
"""Bytes of a list that is read; one of a million files is smaller."""


def seal(folder: Path) -> None:
  """Waits until all of `folder` is on disk, and lists what is in its files."""
  lines = []
  for name in sorted(_names(folder)):
    to_disk(folder / name)
    lines.append(f"{_digest(folder / name)}  {name}\n")
  for parent, _, _ in os.walk(folder):
    to_disk(Path(parent))
  write_atomically({folder / NAME: "".join(lines)})


def fault(folder: Path) -> str | None:
  """What is not as it was sealed, in words; None if all is.

  Only files below `folder` are read, whatever its list names.
  """
  seal = folder / NAME
  if not seal.is_file() or seal.stat().st_size > LARGEST:
    return f"it has no {NAME}: it is of an older version, or was not finished"
  *lines, end = seal.read_bytes().decode(errors="replace").split("\n")
  if end:
    return f"its {NAME} is cut short"
  listed = {line[66:]: line[:66] for line in lines}
  found = set(_names(folder))
  for name in sorted(found | listed.keys()):
    if name not in found:
      return f"its file {name!r} is missing"
    if name not in listed:
      return f"its file {name!r} is in no list of {NAME}"
    if listed[name] != f"{_digest(folder / name)}  ":
      return f"its file {name!r} is not as it was written"
  return None


def _names(folder: Path) -> Iterator[str]:
  """The paths of all files below, but that of the list itself."""
  for parent, _, names in os.walk(folder):
    for name in names:
      path = Path(parent, name).relative_to(folder).as_posix()
      if path != NAME:
        yield path


def _digest(path: Path) -> str:
  if path.is_symlink() or not path.is_file():
    return "no plain file"
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
