# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: who owns it, and what was measured on the way.

Of the processes of a run one writes; the others are told not to.

runs/NAME/run.json        the plain fields of its config, by dotted name
runs/NAME/config.py       the config file, when the run came from one
runs/NAME/metrics.jsonl   {"step", "split": "train" | "validation",
                           "seconds": since the start, metric: number ...}
runs/NAME/events.jsonl    {"step", "event", "text"}: what was out of the
                           ordinary (`training.watch`)
runs/NAME/checkpoints/    the newest checkpoints (`training.checkpoint`)
runs/NAME/lock            held by the process that writes here
runs/NAME/profile/        a window of steps, if asked for (`training.profile`)
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adaptivejax.files import aside, to_disk, write_atomically
from adaptivejax.training import lock
from adaptivejax.untrusted import parse_object, read_bytes

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
RECORD, CONFIG = "run.json", "config.py"
OURS = RECORD, CONFIG, METRICS, EVENTS, lock.NAME, "checkpoints"
INFINITE = (math.inf, -math.inf)
LARGEST = 1e30
LONGEST = 100_000_000
"""Bytes of a file of lines at most."""


@contextlib.contextmanager
def claim(out: Path) -> Iterator[None]:
  """Makes the folder and holds it; nobody else writes in it meanwhile.

  Raises:
    ValueError: it holds something other than a run, or another process that
      lives has it.
  """
  for name in OURS:
    if (out / name).is_symlink():
      raise ValueError(
        f"{out / name} is a link, which is not written through: give the run"
        " another name, or put the file itself there"
      )
  if out.exists() and not out.is_dir():
    raise ValueError(f"{out} is a file: give the run another name")
  names = {path.name for path in out.iterdir()} if out.exists() else set()
  if RECORD not in names and names - {lock.NAME}:
    raise ValueError(
      f"{out} holds something else than a run: give the run another name"
    )
  out.mkdir(parents=True, exist_ok=True)
  with lock.locked(out):
    (out / RECORD).touch()
    for name in (RECORD, CONFIG, METRICS, EVENTS):
      for draft in out.glob(f".{name}.*.part"):  # of a process that was killed
        draft.unlink()
    yield


def content(out: Path) -> list[str]:
  """What is in the folder of a run, and which checkpoints."""
  found = (*out.glob("*"), *out.glob("checkpoints/*"))
  return sorted(path.relative_to(out).as_posix() for path in found)


def untold(out: Path, damaged: Mapping[Path, str]) -> list[str]:
  """Of damaged checkpoints, by path, those that no event has told of yet."""
  if not damaged:
    return []
  told = [str(event.get("text")) for event in read_events(out)]
  return [
    text
    for path, text in damaged.items()
    if not any(said.endswith(f"kept as {path}") for said in told)
  ]


def put_aside(out: Path) -> None:
  """Keeps what was logged of a run that has to begin anew."""
  for name in (METRICS, EVENTS):
    if (out / name).exists():
      aside(out / name)


def describe(out: Path, fields: Mapping[str, Any], source: Path | None) -> None:
  """Writes the plain fields of the config, and a copy of its file, `source`."""
  files: dict[Path, str | bytes] = {
    out / RECORD: json.dumps(fields, indent=2) + "\n"
  }
  copy = out / CONFIG
  if source is not None and source.resolve() != copy.resolve():
    files[copy] = source.read_bytes()
  write_atomically(files)


class Lines:
  """Appends to a file of JSON objects, a line each, each with its `step`.

  Opened at `step`, it drops the lines of later steps, which a run that was
  killed after its newest checkpoint leaves behind and is about to repeat.  With
  `write` false it only remembers.
  """

  def __init__(self, path: Path, step: int, *, write: bool = True):
    self.path = path
    self.writes = write
    self.lines = [line for line in read_lines(path) if line["step"] <= step]
    if write:
      write_atomically({path: "".join(map(_line, self.lines))})

  def add(self, line: dict[str, Any]) -> None:
    """Appends a line; a crash may cut it short, which no reader minds.

    Raises:
      OSError: there is no room for it, with what to do.
    """
    self.lines.append(line)
    if not self.writes:
      return
    try:
      with self.path.open("a") as file:
        file.write(_line(line))
    except OSError as error:
      raise OSError(
        f"{self.path} cannot be written ({error.strerror}): make room; the same"
        " command goes on from the newest checkpoint"
      ) from None

  def sync(self) -> None:
    """Waits until all lines would outlive a crash."""
    if self.writes:
      to_disk(self.path)


class MetricsLog(Lines):
  """metrics.jsonl of a run, opened at a step."""

  def __init__(self, out: Path, step: int, *, write: bool = True):
    read_metrics(out)  # refuses what is none
    super().__init__(out / METRICS, step, write=write)

  @property
  def seconds(self) -> float:
    """Time of the newest line, since the start of the run."""
    return self.lines[-1]["seconds"] if self.lines else 0.0

  @property
  def latest(self) -> dict[str, float]:
    """The newest value of each metric of each split, by `split/metric`."""
    return {
      f"{line['split']}/{name}": value
      for line in self.lines
      for name, value in line.items()
      if name not in ("step", "split", "seconds")
    }

  def write(
    self, step: int, split: str, seconds: float, metrics: Mapping[str, float]
  ) -> None:
    """Adds a line."""
    line = {"step": step, "split": split, "seconds": round(seconds, 3)}
    self.add({**metrics, **line})


def read_metrics(out: Path) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl.

  Raises:
    ValueError: one is not of metrics.
  """
  lines = read_lines(out / METRICS)
  for i, line in enumerate(lines, 1):
    where = f"{out / METRICS}, line {i}"
    if not isinstance(line.get("split"), str) or line.get("seconds") is None:
      raise ValueError(f"{where} must say a step, a split and the seconds.")
    if not all(map(_number, (x for k, x in line.items() if k != "split"))):
      raise ValueError(f"{where}: every metric must be a number.")
  return lines


def read_events(out: Path) -> list[dict[str, Any]]:
  """The lines of events.jsonl."""
  return read_lines(out / EVENTS)


def read_lines(path: Path) -> list[dict[str, Any]]:
  """Its objects; a last line cut short, by a crash or as yet, is left out.

  Raises:
    ValueError: a line is not of a run.
  """
  if not path.exists():
    return []
  lines = read_bytes(path, LONGEST).split(b"\n")[:-1]
  return [_parsed(text, f"{path}, line {i}") for i, text in enumerate(lines, 1)]


def _parsed(text: bytes, where: str) -> dict[str, Any]:
  """A line with its step; NaN is a number here."""
  line = parse_object(text, where, finite=False)
  step = line.get("step")
  if type(step) is not int or not 0 <= step <= LARGEST:
    raise ValueError(f"{where} must say a step.")
  return line


def _number(x: Any) -> bool:
  """Whether it may be a metric: None was not measured."""
  plain = type(x) in (int, float) and not abs(x) > LARGEST
  return x is None or plain or x in INFINITE


def _line(values: Mapping[str, Any]) -> str:
  return json.dumps(values) + "\n"
