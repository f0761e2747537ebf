# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, also after a crash."""

import os
from collections.abc import Mapping
from pathlib import Path


def write_atomically(files: Mapping[Path, str | bytes]) -> None:
  """Writes every file, or leaves what was there before.

  All contents are on disk under temporary names before the first takes its
  place.
  """
  waiting = []
  try:
    for path, content in files.items():
      draft = path.with_name(f".{path.name}.{os.getpid()}.part")
      waiting.append((draft, path))
      if isinstance(content, str):
        content = content.encode("utf-8")
      draft.unlink(missing_ok=True)
      with draft.open("xb") as file:  # follows no link
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    for draft, path in waiting:
      draft.replace(path)
    for folder in {path.parent for path in files}:
      to_disk(folder)
  finally:
    for draft, _ in waiting:
      draft.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
  """Waits until a file, or the names in a folder, would outlive a crash."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


DAMAGED = ".damaged"


def aside(path: Path) -> Path:
  """Renames what is not to be used, and not to be lost; returns where it is."""
  there = path.with_name(path.name + DAMAGED)
  count = 1
  while os.path.lexists(there):
    count += 1
    there = path.with_name(f"{path.name}{DAMAGED}-{count}")
  path.rename(there)
  return there
