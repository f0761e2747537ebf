# SPDX-License-Identifier: Apache-2.0
"""`adaptivejax report`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from adaptivejax.cli.parsing import parse


@dataclasses.dataclass(frozen=True)
class Report:
  """Writes RUN/report.html from what the run measured.

  For example

    adaptivejax report runs/NAME
  """

  run: tyro.conf.Positional[Path]
  """Folder of the run."""


def run(args: Sequence[str]) -> int:
  """Prints where the report is."""
  options = parse(Report, args, "report")
  from adaptivejax.report import rebuild  # slow: help does without

  print(rebuild(options.run))
  return 0
