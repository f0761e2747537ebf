# SPDX-License-Identifier: Apache-2.0
"""`adaptivejax train`."""

import math
from collections.abc import Sequence
from pathlib import Path

from adaptivejax.cli.parsing import parse

HELP = """\
usage: adaptivejax train CONFIG.py [--field value ...]

Trains the run that CONFIG.py describes, in runs/NAME, or goes on with it from
its newest checkpoint.  Ctrl-C or SIGTERM stops after a step, with a checkpoint.
CONFIG.py is Python, with a function `config() -> TrainConfig`.

  --debug-nans   stop at the first step whose loss or gradient is not finite,
                 and name the operation that it comes from

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

  debug = "--debug-nans" in rest
  rest = [arg for arg in rest if arg != "--debug-nans"]
  config = training.load_config(Path(path))
  config = parse(type(config), rest, f"train {path}", default=config)
  out = Path("runs") / config.name
  result = training.train(config, out=out, source=Path(path), debug_nans=debug)
  if result.stopped:
    print(f"stopped after step {result.step}; the same command goes on")
    return 128 + result.stopped
  quality = result.metrics.get("validation/bits_per_byte", math.nan)
  print(f"{out}: {quality:.3f} bits/byte")
  return 0
