# SPDX-License-Identifier: Apache-2.0
"""`adaptivejax train`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adaptivejax.cli.parsing import parse, take

HELP = """\
usage: adaptivejax train CONFIG.py [--field value ...] [--profile STEP:COUNT]
                         [--coordinator HOST:PORT --processes N --process I]

Trains the run that CONFIG.py describes, in runs/NAME, or goes on with it from
its newest checkpoint.  Ctrl-C or SIGTERM stops after a step, with a checkpoint.
CONFIG.py is Python, with a function `config() -> TrainConfig`.

  --debug-nans   stop at the first step whose loss or gradient is not finite,
                 and name the operation that it comes from

Example:
  adaptivejax train configs/NAME.py --steps 500 --optimizer.learning_rate 3e-4

`adaptivejax train CONFIG.py --help` lists the fields of that config.

On many hosts, run the same command on each at once, with --mesh.data -1 or
another mesh of all their devices, and runs/ on storage that all of them mount.
Process 0 writes; a signal to any of them stops all.  On TPU VMs, and in Slurm's
srun, they find each other.  Elsewhere, and on CPUs, say where they meet:

  --coordinator HOST:PORT  a free port of process 0 (JAX_COORDINATOR_ADDRESS)
  --processes N            how many; 1: stay alone  (JAX_NUM_PROCESSES)
  --process I              which this is, 0 to N-1  (JAX_PROCESS_ID)

  adaptivejax train configs/NAME.py --mesh.data -1 \\
    --coordinator 10.0.0.2:8476 --processes 2 --process 1

Where does the time go?  This traces five steps into runs/NAME/profile:

  adaptivejax train configs/NAME.py --profile 100:5
  xprof --logdir runs/NAME/profile      (pip install xprof)
"""


class Command(NamedTuple):
  """What is said of a run on the command line, beside its fields.

  Attributes:
    path: of the config file.
    peers: `coordinator`, `processes`, `process`; None where nothing is said.
    profile: `STEP:COUNT`, or None.
    debug_nans: whether to stop at the first step that is not finite.
    fields: arguments that are for the config.
  """

  path: Path
  peers: tuple[str | None, int | None, int | None]
  profile: str | None
  debug_nans: bool
  fields: list[str]


def run(args: Sequence[str]) -> int:
  """After a signal the exit code is 128 + its number."""
  if args and args[0] in ("-h", "--help"):
    print(HELP, end="")
    return 0
  command = read(args)
  from adaptivejax import training  # slow: help does without
  from adaptivejax.training import hosts, profile

  window = None if command.profile is None else profile.parse(command.profile)
  if not {"-h", "--help"} & {*command.fields}:
    hosts.start(hosts.Peers(*command.peers))
  config = configured(command)
  out = Path("runs") / config.name
  result = training.train(
    config,
    out=out,
    source=command.path,
    window=window,
    debug_nans=command.debug_nans,
  )
  if result.stopped:
    _say(f"stopped after step {result.step}; the same command goes on")
    return 128 + result.stopped
  quality = result.metrics.get("validation/bits_per_byte", math.nan)
  _say(f"{out}: {quality:.3f} bits/byte")
  return 0


def read(args: Sequence[str]) -> Command:
  """Takes the command line apart.

  Raises:
    ValueError: there is no config file, or a number is none.
  """
  path, *rest = args or [""]
  if not path:
    raise ValueError("name a config file; adaptivejax train --help shows how")
  coordinator, rest = take(rest, "--coordinator")
  processes, rest = take(rest, "--processes")
  process, rest = take(rest, "--process")
  profile, rest = take(rest, "--profile")
  debug = "--debug-nans" in rest
  rest = [arg for arg in rest if arg != "--debug-nans"]
  numbers = _whole("--processes", processes), _whole("--process", process)
  peers = coordinator, *numbers
  return Command(Path(path), peers, profile, debug, rest)


def configured(command: Command) -> Any:
  """The config of its file, with the fields of the command line."""
  from adaptivejax import training

  config = training.load_config(command.path)
  title = f"train {command.path}"
  return parse(type(config), command.fields, title, default=config)


def _whole(name: str, text: str | None) -> int | None:
  if text is None:
    return None
  if not text.isdigit():
    raise ValueError(f"{name} {text!r} must be a whole number")
  return int(text)


def _say(text: str) -> None:
  from adaptivejax.training import agreement

  if agreement.is_writer():
    print(text)
