# SPDX-License-Identifier: Apache-2.0
"""Many hosts, one run: how its processes meet.

Each runs the same program over the devices of all, and holds a part of every
array (`training.placement`); what else they share is in `training.agreement`.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax


class Peers(NamedTuple):
  """Where the processes of a run meet; JAX finds out what is None.

  Attributes:
    coordinator: `host:port` of process 0, a free port there.
    processes: how many.
    process: which of them this is.
  """

  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None


VARIABLES = {
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "processes": "JAX_NUM_PROCESSES",
  "process": "JAX_PROCESS_ID",
}
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
UNSAID = Peers()
LEAVING = 60  # seconds that a process which fails alone is waited for


def start(given: Peers = UNSAID) -> None:
  """Joins the processes of a run; call it before anything else uses JAX.

  What is not given is taken from the environment (`VARIABLES`).  If nothing is
  said there either, JAX asks the metadata of a TPU VM, or Slurm inside `srun`;
  elsewhere the process is alone.  Waits up to five minutes for the others.

  A process that dies, or fails alone, ends the others: at once if it is process
  0, else within two minutes.

  Raises:
    ValueError: what is given does not make up a meeting, or JAX is in use.
  """
  found = peers(given, os.environ, on_tpu="tpu" in _platforms())
  if found is None or jax.distributed.is_initialized():
    return
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # Signals are Python's here, and agreed on by `training.agreement`.
  jax.config.update("jax_enable_preemption_service", False)
  method = None if None in found else "deactivate"
  try:
    jax.distributed.initialize(
      *found,
      cluster_detection_method=method,
      shutdown_timeout_seconds=LEAVING,
    )
  except RuntimeError as error:
    raise ValueError(
      f"the processes of the run did not meet: {error}"
    ) from error


def peers(
  given: Peers, environment: Mapping[str, str], *, on_tpu: bool
) -> Peers | None:
  """Where to meet; None for a process that is alone.

  Raises:
    ValueError: a part is missing or makes no sense.
  """
  said = Peers(*(_said(n, v, environment) for n, v in given._asdict().items()))
  coordinator, processes, process = said
  if processes == 1 and process in (None, 0):
    return None
  if processes is not None and processes < 1:
    raise ValueError(f"--processes {processes} must be at least 1")
  top = (processes or math.inf) - 1
  if process is not None and not 0 <= process <= top:
    raise ValueError(
      f"--process {process} must be one of 0 to {top}: --processes is"
      f" {processes}"
    )
  if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
    raise ValueError(
      f"--coordinator {coordinator!r} must be HOST:PORT of process 0, such as"
      " 10.0.0.2:8476"
    )
  in_slurm = all(name in environment for name in SLURM)
  tasks = environment.get("SLURM_NTASKS", "1")
  if on_tpu or (in_slurm and tasks != "1"):
    return said
  missing = [name for name, value in said._asdict().items() if value is None]
  if len(missing) == len(said):
    return None
  if missing:
    flags = " and ".join(f"--{n} (or {VARIABLES[n]})" for n in missing)
    raise ValueError(
      f"the processes of a run meet by --coordinator, --processes and"
      f" --process: give {flags} too"
    )
  return said


def _platforms() -> str:
  """Those JAX will try; it names TPUs by itself where it finds any."""
  return getattr(jax.config, "jax_platforms", None) or ""


def _said(name: str, value: Any, environment: Mapping[str, str]) -> Any:
  text = environment.get(VARIABLES[name])
  if value is not None or text is None:
    return value
  if name == "coordinator":
    return text
  if not text.isdigit():
    raise ValueError(f"{VARIABLES[name]}={text!r} must be a whole number")
  return int(text)
