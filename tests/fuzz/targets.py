# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: each parser as a function of bytes, and bytes to begin with.

A target reads what a stranger could have written.  It may succeed, or raise a
ValueError of ours: one line that names the file or field.  Anything else is a
crash: another type of error, a warning, a process, a connection, a pickle, or
a file that is written elsewhere.
"""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import adaptivejax as aj
from adaptivejax import cli, report
from adaptivejax.io import Pretrained
from tests.io import folders
from tests.report.test_report import full


class Target(NamedTuple):
  """What to fuzz.

  Attributes:
    seeds: makes the first files.
    read: reads one, `read(data, folder)`, the folder being empty or its own.
    structured: files are JSON, to be mutated as such.
  """

  seeds: Callable[[], list[bytes]]
  read: Callable[[bytes, Path], Any]
  structured: bool = False


class Crash(Exception):
  """What no file may do."""


PLAIN = folders.GOLDENS / "mistral"


def _safetensors(data, folder):
  _model(folder)
  (folder / "model.safetensors").write_bytes(data)
  aj.load(folder)


def _model(folder):
  """A folder with a model, of links to nothing."""
  if not (folder / "config.json").exists():
    shutil.copy(PLAIN / "config.json", folder)


def _tensors() -> list[bytes]:
  whole = (PLAIN / "model.safetensors").read_bytes()
  length = int.from_bytes(whole[:8], "little")
  empty = b'{"__metadata__":{"format":"pt"}}'
  one = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
  make = lambda head, data: len(head).to_bytes(8, "little") + head + data
  return [whole, whole[: 8 + length], make(empty, b""), make(one, bytes(4))]


def _header(data, folder):
  """The header alone is mutated, as JSON, before the data of a real file."""
  whole = (PLAIN / "model.safetensors").read_bytes()
  length = int.from_bytes(whole[:8], "little")
  rest = whole[8 + length :]
  _safetensors(len(data).to_bytes(8, "little") + data + rest, folder)


def _headers() -> list[bytes]:
  whole = (PLAIN / "model.safetensors").read_bytes()
  return [whole[8 : 8 + int.from_bytes(whole[:8], "little")]]


def _config(data, folder):
  if not (folder / "model.safetensors").exists():
    shutil.copy(PLAIN / "model.safetensors", folder)
  (folder / "config.json").write_bytes(data)
  aj.load(folder)


def _configs() -> list[bytes]:
  goldens = Path(folders.GOLDENS).parent
  return [path.read_bytes() for path in goldens.rglob("config.json")]


def _index(data, folder):
  _model(folder)
  shutil.copy(PLAIN / "model.safetensors", folder / "model-1.safetensors")
  (folder / "model.safetensors.index.json").write_bytes(data)
  aj.load(folder)


def _indices() -> list[bytes]:
  names = json.loads(_headers()[0])
  table = {n: "model-1.safetensors" for n in names if n != "__metadata__"}
  away = dict.fromkeys(table, "../model-1.safetensors")
  return [json.dumps({"weight_map": m}).encode() for m in (table, away)]


def _gguf(data, folder):
  (folder / "model.gguf").write_bytes(data)
  found = aj.load(folder / "model.gguf")
  if "tokenizer.json" in found.files:
    found.tokenizer()


def _ggufs() -> list[bytes]:
  from tests.io import test_gguf as made

  def tokens(writer):
    for name, value in made.SAID.items():
      add = writer.add_array if isinstance(value, list) else writer.add_string
      add(name, value)

  with tempfile.TemporaryDirectory() as folder:
    small = Path(folder) / "a.gguf", Path(folder) / "b.gguf"
    made.write(small[0], made.weights(tied=True))
    made.write(small[1], made.weights(), kind="Q8_0", more=tokens)
    whole = [path.read_bytes() for path in small]
  return [*whole, *(data[:4000] for data in whole)]


def _tokenizer(data, folder):
  del folder
  Pretrained(None, {}, {"tokenizer.json": data}).tokenizer()


def _tokenizers() -> list[bytes]:
  from adaptivejax.io.gguf_tokenizer import tokenizer_files
  from tests.io.test_gguf import SAID

  return [tokenizer_files(SAID)["tokenizer.json"], b"{}"]


def _report(data, folder):
  (folder / "report.json").write_bytes(data)
  report.rebuild(folder)


def _reports() -> list[bytes]:
  def wide(**more):
    made = report.Report("t", "c", {"cores": 2}, **more)
    return report.store.to_json(made).encode()

  budgets = report.data.BudgetCurve("m", "accuracy", (64.0, 128.0), (0.5, 1.0))
  mixture = report.Mixture("m", "s", ((0.5, 0.5),), 0.0, (1.0,), (2.0,))
  return [
    report.store.to_json(full()).encode(),
    wide(
      budgets=(budgets,), samples=(report.Sample(b"a", b"b", "m", "s", 1.0),)
    ),
    wide(mixtures=(mixture,)),
  ]


def _metrics(data, folder):
  (folder / "metrics.jsonl").write_bytes(data)
  report.rebuild(folder)


def _lines() -> list[bytes]:
  from tests.report.test_runs import LINES

  text = "".join(json.dumps(line) + "\n" for line in LINES)
  more = '{"step": 9, "split": "train", "seconds": 3, "loss": NaN}\n'
  return [text.encode(), (text + more + '{"step": 3, "spl').encode()]


def _cli(data, folder):
  """A byte for the command, and its arguments, apart by line breaks."""
  args = data[1:].decode("utf-8", "replace").split("\n")
  if data and (name := (*cli.COMMANDS, "")[data[0] % 6]):
    args = [name, *args]
  with contextlib.chdir(folder):
    errors, path = io.StringIO(), list(sys.path)
    try:
      with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
      ):
        code = cli.main(args)
    finally:
      sys.path[:] = path
  said = errors.getvalue()
  if code == 2 and (said.count("\n") != 1 or not said.startswith("adaptivej")):
    raise Crash(f"a mistake is one line; {args} said {said!r}")
  if code not in (0, 1, 2):
    raise Crash(f"{args} ends with {code}")


def _commands() -> list[bytes]:
  from tests.test_cli import MISTAKES

  topology = "compile c.py --topology v5e:4x4 --mesh.fsdp 16 --explain"
  commands = [*MISTAKES, "--help", "report .", "report nowhere", topology]

  def coded(command):
    name, _, rest = command.partition(" ")
    if name not in cli.COMMANDS:
      return b"\x05" + command.replace(" ", "\n").encode()
    number = cli.COMMANDS.index(name)
    return bytes([number]) + rest.replace(" ", "\n").encode()

  return [coded(command) for command in commands]


TARGETS = {
  "safetensors": Target(_tensors, _safetensors),
  "safetensors header": Target(_headers, _header, structured=True),
  "config": Target(_configs, _config, structured=True),
  "index": Target(_indices, _index, structured=True),
  "gguf": Target(_ggufs, _gguf),
  "tokenizer": Target(_tokenizers, _tokenizer, structured=True),
  "report": Target(_reports, _report, structured=True),
  "metrics": Target(_lines, _metrics),
  "command line": Target(_commands, _cli),
}

FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec")
FORBIDDEN += ("os.posix_spawn", "socket.connect", "os.fork")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Guard:
  """Sees what a target does besides reading; on while `folder` is set."""

  def __init__(self):
    self.folder: Path | None = None
    sys.addaudithook(self.saw)

  def saw(self, event: str, args) -> None:
    if self.folder is None:
      return
    if event.startswith(FORBIDDEN):
      raise Crash(f"a file made us {event}{args}"[:300])
    writes = event == "open" and isinstance(args[0], str) and args[2] & WRITES
    home = str(self.folder)
    if writes and not os.path.realpath(args[0]).startswith((home, "/dev/")):
      raise Crash(f"a file made us write {args[0]}")


GUARD: list[Guard] = []


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
  """Nothing is run, sent, or written elsewhere."""
  if not GUARD:
    GUARD.append(Guard())
  GUARD[0].folder = folder.resolve()
  try:
    yield
  finally:
    GUARD[0].folder = None


def try_file(target: Target, data: bytes, folder: Path) -> str:
  """ "" if the file was read, or the error it was refused with.

  Raises:
    Crash: or anything else that is no ValueError of ours.
  """
  try:
    with warnings.catch_warnings(), guarded(folder):
      warnings.simplefilter("error")
      target.read(data, folder)
  except ValueError as error:
    said = str(error)
    if type(error) is not ValueError or len(said.split()) < 3:
      raise Crash(f"no error of ours: {error!r}"[:300]) from error
    return said
  return ""
