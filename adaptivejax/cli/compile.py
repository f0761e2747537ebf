# SPDX-License-Identifier: Apache-2.0
"""`adaptivejax compile`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptivejax.cli.parsing import parse, take
from adaptivejax.files import write_atomically

HELP = """\
usage: adaptivejax compile CONFIG.py --topology CHIP:SHAPE [--json FILE]
       adaptivejax compile CONFIG.py --topology CHIP:SHAPE --budgets 1,.5,.25
       adaptivejax compile CONFIG.py --topology CHIP:SHAPE --explain

Compiles the train step of a config, and a step of decoding, for devices that
need not be here, by their real compiler, and says whether they fit, what they
compute, and what devices send one another.  Nothing of the size of the model is
made.  With --explain it compiles nothing: it lists where each array of the
state lies.  More arguments set fields, as for `adaptivejax train`.

  --topology v5e:4x4     16 chips; v4, v5p, v6e alike, h100:8, or cpu:8
  --only train           or decode: that program alone
  --budgets 1,.5,.25     the train step of `config(budget)` at each, in a table;
                         one budget: that config instead of the default
  --explain              a line for each array, with the rule that placed it
  --json FILE            what is printed, for programs

How it decodes a config file says by `def decoding() -> Decoding`; else as many
rows as a batch has, as long as its context, with all layers.  FLOPs count every
round of every loop, and of a conditional the dearest branch; where the rounds
are data, the most there can be, and lines below tell what a share of them is.

Of the kernels of v5e, v5p and v6e the schedules of the compiler are read: how
near their main loops come to the peak, and the cycles that their FLOPs take at
that pace, without what is around the loops and what is waited for.

The compilers are packages: pip install 'adaptivejax[tpu]', or [cuda].  For h100
the kernels of Hopper GPUs are part of a program only where such a GPU is; else
their XLA forms are.

Example:
  adaptivejax compile configs/scale/experts_100b.py --topology v6e:16x16
"""
PROGRAMS = ("train", "decode")


def run(args: Sequence[str]) -> int:
  """Prints the report; the exit code is 1 if a program does not fit."""
  path, *rest = args or [""]
  if path in ("-h", "--help") or "--help" in rest or "-h" in rest:
    print(HELP, end="")
    return 0
  topology, rest = take(rest, "--topology")
  out, rest = take(rest, "--json")
  only, rest = take(rest, "--only")
  budgets, rest = take(rest, "--budgets")
  explain = "--explain" in rest
  rest = [arg for arg in rest if arg != "--explain"]
  if not path or topology is None:
    raise ValueError(
      "name a config file and a --topology; see adaptivejax compile --help"
    )
  if only not in (None, *PROGRAMS):
    raise ValueError(f"--only {only}: it is one of {', '.join(PROGRAMS)}")
  shares = [_share(text) for text in budgets.split(",")] if budgets else [None]
  kind, _, count = topology.partition(":")
  if kind == "cpu" and count.isdigit():
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", count)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the chip need not be here
  from adaptivejax.training import TrainConfig, aot, tpu_schedule
  from adaptivejax.training.config import run_config

  schedules = None
  if kind in tpu_schedule.CORES and not explain and len(shares) == 1:
    schedules = tpu_schedule.ask()
  configs = []
  for share in shares:
    given: dict[str, Any] = {} if share is None else {"budget": share}
    config = run_config(Path(path), TrainConfig, **given)
    configs.append(parse(TrainConfig, rest, f"compile {path}", default=config))
  if explain:
    return _explain(configs[0], topology, out)
  if len(configs) > 1:
    found = [aot.compile_step(config, topology) for config in configs]
    _compare(shares, found)
  else:
    found = []
    for name in PROGRAMS if only is None else (only,):
      found.append(_program(name, configs[0], Path(path), topology, schedules))
      _show(found[-1])
  _write(out, [program.as_json() for program in found])
  return 0 if all(program.fits for program in found) else 1


def _program(
  name: str, config: Any, path: Path, topology: str, schedules: Path | None
) -> Any:
  from adaptivejax.training import aot
  from adaptivejax.training.config import run_config, says
  from adaptivejax.training.decoding import Decoding

  if name == "train":
    return aot.compile_step(config, topology, schedules)
  decoding = Decoding(config.data.batch, config.data.context)
  if says(path, "decoding"):
    decoding = run_config(path, Decoding, "decoding")
  return aot.compile_decoding(config, decoding, topology, schedules)


def _share(text: str) -> float:
  try:
    share = float(text)
  except ValueError:
    share = -1.0
  if not 0 < share <= 1:
    raise ValueError(f"--budgets {text}: each is a share in (0, 1]")
  return share


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
  word = "fits" if found.fits else "DOES NOT FIT"
  table.add_row(
    "memory of a device",
    f"{found.held / 1e9:.3f} of {found.memory / 1e9:.1f} GB: {word}"
    f" ({found.arguments / 1e9:.3f} arguments, {found.temporaries / 1e9:.3f}"
    " beside them)",
  )
  if not found.fits:
    over = (found.held - found.memory) / 1e9
    table.add_row("too much", f"{over:.3f} GB; the largest arrays:")
    for size, shape, origin in found.largest:
      table.add_row("", f"{size / 1e9:.3f} GB {shape} {origin}")
  table.add_row("FLOPs of a device", f"{found.flops:.4g}")
  table.add_row("bytes of memory moved", f"{found.work.at(1.0)[1]:.4g}")
  if found.work.data_flops:
    for share in (0.5, 0.25):
      flops, moved = found.work.at(share)
      table.add_row(
        f"where data ask for {share:g} of it",
        f"{flops:.4g} FLOPs, {moved:.4g} bytes",
      )
  loops = f"{found.conditionals} conditionals, {found.loops} loops"
  if found.work.unknown:
    loops += f", {found.work.unknown} of unknown length: one round counts"
  table.add_row("kept in the program", loops)
  for name, seconds in found.seconds.items():
    table.add_row(f"least time of {name}", f"{seconds * 1e3:.4g} ms")
  table.add_row(
    "processor time",
    f"{found.trace_seconds:.0f} s to trace, {found.compile_seconds:.0f} s to"
    " compile",
  )
  console = Console()
  console.print(table)
  if found.kernels:
    console.print(_kernels(found.kernels))
  sent = Table(
    "collective", "over", "in a step", "in the text", "MB received", "largest"
  )
  for c in found.collectives:
    mb = f"{c.bytes / 1e6:.3f}"
    sent.add_row(c.kind, c.axes, str(c.count), str(c.sites), mb, c.largest)
  console.print(sent)


def _kernels(kernels: Sequence[Any]) -> Any:
  """The table of the kernels of a program."""
  from rich.table import Table

  table = Table(
    "kernel", "in a step", "in the text", "FLOPs", "of the peak", "spills",
    "Mcycles",
  )  # fmt: skip
  for k in kernels:
    pace = "–" if k.pace is None else f"{k.pace:.0%}"
    spills = "–" if k.spills is None else str(k.spills)
    cycles = "–" if k.cycles is None else f"{k.cycles / 1e6:.3f}"
    flops = f"{k.flops:.4g}"
    table.add_row(
      k.name, str(k.count), str(k.sites), flops, pace, spills, cycles
    )
  return table


def _compare(shares: Sequence[Any], programs: Sequence[Any]) -> None:
  """The train step at several budgets."""
  from rich.console import Console
  from rich.table import Table

  first = programs[0]
  table = Table(
    "budget", "FLOPs", f"of {shares[0]:g}", "MB moved", "MB received",
    "GB held", "least ms", title=f"{first.name} on {first.topology}, a device",
  )  # fmt: skip
  for share, found in zip(shares, programs, strict=True):
    table.add_row(
      f"{share:g}",
      f"{found.flops:.4g}",
      f"{found.flops / first.flops:.3f}",
      f"{found.work.at(1.0)[1] / 1e6:.0f}",
      f"{sum(c.bytes for c in found.collectives) / 1e6:.0f}",
      f"{found.held / 1e9:.3f}",
      f"{max(found.seconds.values()) * 1e3:.4g}",
    )
  Console().print(table)
