# SPDX-License-Identifier: Apache-2.0
"""Without the traces that a failed write leaves on standard error.

When a write fails, orbax logs the traceback of what it also raises, and those
writes of tensorstore that still run find the loop they report to closed.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Iterator
from types import TracebackType


@contextlib.contextmanager
def no_traces() -> Iterator[None]:
  """Inside, what is said of a failed write is what is raised.

  Do not leave it after one: other writes report later.
  """
  absl, hook = logging.getLogger("absl"), sys.unraisablehook

  def show(unraisable):
    if not _late(unraisable.exc_value, unraisable.exc_traceback):
      hook(unraisable)

  absl.addFilter(_untraced)
  sys.unraisablehook = show
  yield
  absl.removeFilter(_untraced)
  sys.unraisablehook = hook


def _untraced(record: logging.LogRecord) -> bool:
  return not record.exc_info


def _late(error: BaseException | None, trace: TracebackType | None) -> bool:
  """Whether a write reports to a loop that was closed."""
  where = trace.tb_frame.f_code.co_filename if trace else ""
  ours = where.startswith(asyncio.__file__.rpartition("/")[0])
  return ours and str(error) == "Event loop is closed"
