# SPDX-License-Identifier: Apache-2.0
"""The command line: `adaptivejax train | adapt | generate | report | compile`.

A mistake is one line and exit code 2, before anything is compiled; with
ADAPTIVEJAX_DEBUG=1 it is a traceback.  Each command is a module with a function
`run(args) -> exit code`, imported when it is called for, so that
`adaptivejax --help` is quick.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from adaptivejax.cli.parsing import suggestion

HELP = """\
usage: adaptivejax COMMAND ...

Adaptive computation for JAX: train a model that spends compute where it is
worth it, sample from it at a budget, and see where the compute went.

  train CONFIG.py [--field value ...]   train, or go on with the run
  adapt CONFIG.py [--field value ...]   make a pretrained model adaptive
  generate RUN/config.py --prompt TEXT  continue a text, adaptively
  report RUN                            write RUN/report.html
  compile CONFIG.py --topology v5e:4x4  for a pod that need not be here

Examples:
  adaptivejax train configs/NAME.py --steps 500 --data.batch 8
  adaptivejax generate runs/NAME/config.py --prompt "def main(" --policy calm
  adaptivejax report runs/NAME

`adaptivejax COMMAND --help` tells more.
"""

COMMANDS = ("train", "adapt", "generate", "report", "compile")


def main(args: Sequence[str] | None = None) -> int:
  """Runs a command; the exit code is 0, or 2 after a mistake."""
  name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
  if name in ("-h", "--help"):
    print(HELP, end="")
    return 0
  try:
    if name not in COMMANDS:
      raise ValueError(f"no command {name!r}{suggestion(name, COMMANDS)}")
    return importlib.import_module(f"adaptivejax.cli.{name}").run(rest)
  except SystemExit as exit:  # help was printed
    return int(exit.code or 0)
  except KeyboardInterrupt:
    return 130
  except (ValueError, OSError, ModuleNotFoundError) as error:
    if os.environ.get("ADAPTIVEJAX_DEBUG"):
      raise
    missing = isinstance(error, ModuleNotFoundError)
    hint = "; pip install 'adaptivejax[data]'" if missing else ""
    print(f"adaptivejax: {' '.join(str(error).split())}{hint}", file=sys.stderr)
    return 2
