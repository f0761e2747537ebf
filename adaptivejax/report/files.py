# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there."""

import os
from collections.abc import Mapping
from pathlib import Path


def write_atomically(files: Mapping[Path, str]) -> None:
  """Writes every file, or leaves what was there before.

  All texts are on disk under temporary names before the first takes its place.
  """
  waiting = []
  try:
    for path, text in files.items():
      draft = path.with_name(f".{path.name}.{os.getpid()}.part")
      waiting.append((draft, path))
      draft.unlink(missing_ok=True)
      with draft.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for draft, path in waiting:
      draft.replace(path)
  finally:
    for draft, _ in waiting:
      draft.unlink(missing_ok=True)
