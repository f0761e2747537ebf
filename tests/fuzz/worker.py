# SPDX-License-Identifier: Apache-2.0
"""One target under atheris.

python -m tests.fuzz.worker TARGET -runs=9
"""

import sys
import tempfile
from pathlib import Path

import atheris  # pyrefly: ignore[missing-import]

with atheris.instrument_imports(
  include=["adaptivejax.io", "adaptivejax.report", "adaptivejax.untrusted",
           "adaptivejax.training.run", "adaptivejax.cli"],
):  # fmt: skip
  from adaptivejax import cli, io, report, untrusted  # noqa: F401
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, try_file


def main() -> None:
  name = sys.argv.pop(1)
  target = TARGETS[name]
  room = tempfile.TemporaryDirectory()
  folder = Path(room.name)
  for seed in target.seeds():  # what is imported late is not the file's doing
    try_file(target, seed, folder)

  def one_file(data: bytes) -> None:
    try_file(target, data, folder)

  def mutate(data: bytes, size: int, seed: int) -> bytes:
    made = mutated(data, size, seed) if seed % 4 else None
    return atheris.Mutate(data, size) if made is None else made

  how = {"custom_mutator": mutate} if target.structured else {}
  atheris.Setup(sys.argv, one_file, **how)
  atheris.Fuzz()


if __name__ == "__main__":
  main()
