# SPDX-License-Identifier: Apache-2.0
"""The machine a figure was measured on: no figure without it."""

import datetime
import os
import platform
from pathlib import Path

import jax


def environment() -> dict[str, str | int | float]:
  """What ran where: goes into every report and benchmark file."""
  now = datetime.datetime.now(datetime.UTC)
  record: dict[str, str | int | float] = {
    "date": now.isoformat(timespec="seconds"),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "backend": jax.default_backend(),
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "cpu": _cpu(),
    "cores": _cores(),
    "system": f"{platform.system()} {platform.machine()}",
  }
  if hasattr(os, "getloadavg"):
    record["load before"] = round(os.getloadavg()[0], 2)
  return record


def _cores() -> int:
  """The cores this process may use, which can be fewer than there are."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _cpu() -> str:
  info = Path("/proc/cpuinfo")
  if info.is_file():
    for line in info.read_text(errors="replace").splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()
