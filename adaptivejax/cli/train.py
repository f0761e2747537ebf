# SPDX-License-Identifier: Apache-2.0
"""`adaptivejax train`."""

from collections.abc import Sequence
from pathlib import Path

from adaptivejax.cli.parsing import parse

HELP = """\
usage: adaptivejax train CONFIG.py [--field value ...]

Trains the run that CONFIG.py describes, in runs/NAME, or goes on with it from
its newest checkpoint.  Ctrl-C or SIGTERM stops after a step, with a checkpoint.
CONFIG.py is Python, with a function `config() -> TrainConfig`.

Example:
  adaptivejax train configs/NAME.py --steps 500 --optimizer.learning_rate 3e-4

`adaptivejax train CONFIG.py --help` lists the fields of that config.
"""


def run(args: Sequence[str]) -> int:
  """After a signal the exit code is 128 + its number."""
  path, *rest = args or [""]
  if path in ("-h", "--help"):
    print(HELP, end="")
    return 0
  if not path:
    raise ValueError("name a config file; adaptivejax train --help shows how")
  from adaptivejax import training  # slow: help does without

  config = training.load_config(Path(path))
  config = parse(type(config), rest, f"train {path}", default=config)
  out = Path("runs") / config.name
  result = training.train(config, out=out, source=Path(path))
  if result.stopped:
    print(f"stopped after step {result.step}; the same command goes on")
    return 128 + result.stopped
  print(f"{out}: {result.metrics['validation/bits_per_byte']:.3f} bits/byte")
  return 0
