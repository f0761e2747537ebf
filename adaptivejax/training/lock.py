# SPDX-License-Identifier: Apache-2.0
"""Who writes in the folder of a run: one process at a time.

The lock is the kernel's (`flock`), so a process that dies, however it dies,
leaves none behind.  The file stays and says who had it last.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

NAME = "lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """Holds `folder`, which is there, for this process.

  Raises:
    ValueError: another one that lives holds it, or its file system has no
      locks.
  """
  handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    _lock(handle, folder)
    with contextlib.suppress(OSError):  # a full disk: the lock needs no words
      os.ftruncate(handle, 0)
      os.write(handle, _me().encode())
    yield
  finally:
    os.close(handle)


def _lock(handle: int, folder: Path) -> None:
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    holder = os.read(handle, 200).decode(errors="replace").strip()
    raise ValueError(
      f"{folder} is being written by {holder or 'another process'}: wait for"
      " it, stop it, or give the run another name"
    ) from None
  except OSError as error:
    raise ValueError(
      f"{folder} is on a file system without locks ({error.strerror}): two runs"
      " could write in it at once; keep runs/ on another"
    ) from None


def _me() -> str:
  return f"process {os.getpid()} on {socket.gethostname()}\n"
