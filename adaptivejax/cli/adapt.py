# SPDX-License-Identifier: Apache-2.0
"""`adaptivejax adapt`."""

from collections.abc import Sequence
from pathlib import Path

from adaptivejax.cli.parsing import parse

HELP = """\
usage: adaptivejax adapt CONFIG.py [--field value ...]

Makes the pretrained model of CONFIG.py adaptive in several ways, teaches each
for a short while, measures quality and speed beside the model as it was, and
writes runs/NAME/report.html.  CONFIG.py is Python, with a function
`config() -> AdaptConfig`.

Example:
  adaptivejax adapt configs/adapt/smollm2.py --recipes exits plans --steps 20

`adaptivejax adapt CONFIG.py --help` lists the fields of that config.
"""


def run(args: Sequence[str]) -> int:
  """Writes the report of a config."""
  path, *rest = args or [""]
  if path in ("-h", "--help"):
    print(HELP, end="")
    return 0
  if not path:
    raise ValueError("name a config file; adaptivejax adapt --help shows how")
  from adaptivejax import adapt  # slow: help does without

  config = adapt.load_config(Path(path))
  config = parse(type(config), rest, f"adapt {path}", default=config)
  adapt.adapt(config, Path("runs") / config.name)
  return 0
