# SPDX-License-Identifier: Apache-2.0
"""`adaptivejax compile`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptivejax.cli.parsing import parse
from adaptivejax.files import write_atomically

HELP = """\
usage: adaptivejax compile CONFIG.py --topology CHIP:SHAPE [--json FILE]
       adaptivejax compile CONFIG.py --topology CHIP:SHAPE --explain

Compiles the train step of a config for devices that need not be here, by their
real compiler, and says whether it fits, what it computes, and what devices send
one another.  With --explain it compiles nothing: it lists where each array of
the state lies.  More arguments set fields, as for `adaptivejax train`.

  --topology v5e:4x4     16 chips; v4, v5p, v6e alike, h100:8, or cpu:8
  --explain              a line for each array, with the rule that placed it
  --json FILE            what is printed, for programs

The compilers are packages: pip install 'adaptivejax[tpu]', or [cuda].

Example:
  adaptivejax compile configs/NAME.py --topology v5e:4x4 --mesh.fsdp 16
"""


def run(args: Sequence[str]) -> int:
  """Prints the report; the exit code is 1 if the step does not fit."""
  path, *rest = args or [""]
  if path in ("-h", "--help") or "--help" in rest or "-h" in rest:
    print(HELP, end="")
    return 0
  topology, rest = _take(rest, "--topology")
  out, rest = _take(rest, "--json")
  explain = "--explain" in rest
  rest = [arg for arg in rest if arg != "--explain"]
  if not path or topology is None:
    raise ValueError(
      "name a config file and a --topology; see adaptivejax compile --help"
    )
  kind, _, count = topology.partition(":")
  if kind == "cpu" and count.isdigit():
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", count)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the chip need not be here
  from adaptivejax import training
  from adaptivejax.training import aot

  config = training.load_config(Path(path))
  config = parse(type(config), rest, f"compile {path}", default=config)
  if explain:
    return _explain(config, topology, out)
  found = aot.compile_step(config, topology)
  _show(found)
  _write(out, found.as_json())
  return 0 if found.fits else 1


def _take(args: Sequence[str], name: str) -> tuple[str | None, list[str]]:
  """The value of an option, and the other arguments."""
  if name not in args:
    return None, list(args)
  at = list(args).index(name)
  if at + 1 >= len(args):
    raise ValueError(f"{name} needs a value; --help shows one")
  return args[at + 1], [*args[:at], *args[at + 2 :]]


def _write(out: str | None, found: Any) -> None:
  if out is not None:
    write_atomically({Path(out): json.dumps(found, indent=2) + "\n"})


def _explain(config: Any, topology: str, out: str | None) -> int:
  from rich.console import Console
  from rich.table import Column, Table

  from adaptivejax.training import aot
  from adaptivejax.training.chips import devices_of

  placed = aot.places(config, devices_of(topology)[1])
  array = Column("array", overflow="fold", ratio=2)
  table = Table(array, "shape", "mesh axes", "rule", "MB on a device")
  for p in placed:
    axes = ", ".join("–" if a is None else str(a) for a in p.spec) or "whole"
    shape = " × ".join(map(str, p.shape)) or "–"
    table.add_row(p.path, shape, axes, p.rule or "–", f"{p.bytes / 1e6:.3f}")
  total = sum(p.bytes for p in placed)
  Console().print(table)
  print(f"{total / 1e9:.3f} GB of state on each device")
  _write(
    out,
    [
      p._asdict() | {"dtype": str(p.dtype), "spec": [*map(str, p.spec)]}
      for p in placed
    ],
  )
  return 0


def _show(found: Any) -> None:
  from rich.console import Console
  from rich.table import Table

  axes = " × ".join(f"{n} {s}" for n, s in found.mesh.items() if s > 1)
  table = Table(
    title=f"{found.name} on {found.topology}: {axes or 'one device'}",
    show_header=False,
  )
  held = found.arguments + found.temporaries
  word = "fits" if found.fits else "DOES NOT FIT"
  table.add_row(
    "memory of a device",
    f"{held / 1e9:.3f} of {found.memory / 1e9:.0f} GB: {word}"
    f" ({found.arguments / 1e9:.3f} arguments, {found.temporaries / 1e9:.3f}"
    " beside them)",
  )
  table.add_row("FLOPs of a device", f"{found.flops:.3g}")
  table.add_row("bytes of memory moved", f"{found.bytes:.3g}")
  table.add_row("conditionals and loops", str(found.branches))
  kernels = ", ".join(f"{n} {c}" for n, c in found.kernels.items())
  table.add_row("kernels", kernels or "none")
  for name, seconds in found.seconds.items():
    table.add_row(f"least time of {name}", f"{seconds * 1e3:.3g} ms")
  table.add_row("compiled in", f"{found.compile_seconds:.0f} s")
  console = Console()
  console.print(table)
  sent = Table("collective", "over", "in a step", "in the text", "MB received")
  for c in found.collectives:
    row = c.kind, c.axes, str(c.count), str(c.sites), f"{c.bytes / 1e6:.3f}"
    sent.add_row(*row)
  console.print(sent)
