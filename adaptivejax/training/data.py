# SPDX-License-Identifier: Apache-2.0
"""Byte-level text: documents, a split by file, windows, a resumable stream.

The default corpus needs no download: the sources of the running Python's
standard library (its docstrings with them) and the text of its language
reference, found where this interpreter keeps them.  A document belongs to the
validation split by a hash of its name, so the split is the same on every
machine and no file is seen on both sides.

Axes: N windows or batches, B batch, S context + 1, the bytes of a window.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8

if TYPE_CHECKING:
  import grain

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
SKIPPED |= {"encodings"}  # tables of characters, not text
Documents = dict[str, bytes]


@dataclass(frozen=True)
class DataConfig:
  """The text and how it is cut; all static."""

  corpus: str = "python"
  """`python` for the standard library's sources and documentation, or the path
  of a text file or of a folder of them."""

  context: int = 256
  """Bytes that the model sees at once."""

  batch: int = 16
  """Windows of text in a batch."""

  validation: float = 0.05
  """Share of the files to hold out; of the bytes, if there is one file."""

  seed: int = 0
  """Seed of the order of the windows."""

  def __post_init__(self):
    """Refuses settings outside their range."""
    if self.context < 1 or self.batch < 1:
      raise ValueError(
        f"context={self.context} and batch={self.batch} must be at least 1"
      )
    if not 0 < self.validation < 1:
      raise ValueError(
        f"validation={self.validation} must be a share, in (0, 1)"
      )


@dataclass(frozen=True, eq=False)
class Batch:
  """Windows of a text, read where they are asked for.

  `np.asarray(batch)` reads all of it; of many hosts each reads the rows of its
  own devices.
  """

  cut: UInt8[np.ndarray, "N S"]
  """All windows."""

  numbers: Int[np.ndarray, " B"]
  """Those of the batch."""

  @property
  def shape(self) -> tuple[int, int]:
    """Of the whole batch, `(B, S)`."""
    return len(self.numbers), self.cut.shape[1]

  def read(self, part: Any) -> Int32[np.ndarray, "b s"]:
    """A part, given as an index of the whole: a slice for each axis."""
    rows, bytes_ = part
    return self.cut[self.numbers[rows], :][:, bytes_].astype(np.int32)

  def __array__(self, dtype=None, copy=None) -> Int[np.ndarray, "B S"]:
    return self.read((slice(None), slice(None))).astype(dtype or np.int32)


class Corpus(NamedTuple):
  """Documents by name; no document is in both splits."""

  train: Documents
  validation: Documents


def load_corpus(config: DataConfig) -> Corpus:
  """Reads and splits the corpus.

  Raises:
    ValueError: it does not exist, or a split is too small for one batch.
  """
  documents = _read(config.corpus)
  if len(documents) == 1:
    corpus = _split_bytes(documents, config.validation)
  else:
    held = {name for name in documents if _held(name, config.validation)}
    corpus = Corpus(
      {name: text for name, text in documents.items() if name not in held},
      {name: text for name, text in documents.items() if name in held},
    )
  for split, part in corpus._asdict().items():
    count = max(0, len(stream(part)) - 1) // config.context
    if count < config.batch:
      raise ValueError(
        f"the {split} split of corpus {config.corpus!r} is too small for one"
        f" batch: {count} windows of {config.context} bytes, and data.batch="
        f"{config.batch}; use more text, a smaller data.batch or data.context"
      )
  return corpus


def stream(documents: Documents) -> UInt8[np.ndarray, " bytes"]:
  """The documents in order of name, joined by a newline."""
  text = b"\n".join(documents[name] for name in sorted(documents))
  return np.frombuffer(text, np.uint8)


def windows(documents: Documents, context: int) -> UInt8[np.ndarray, "N S"]:
  """Windows side by side, a view: each byte but the first is a target once."""
  view = np.lib.stride_tricks.sliding_window_view
  return view(stream(documents), context + 1)[::context]


def training_batches(
  documents: Documents, config: DataConfig
) -> "grain.DatasetIterator":
  """Endless shuffled batches (`Batch`), each epoch in another order.

  What step n reads is a function of `config.seed` and n, whatever the number of
  hosts.  The place of the iterator is data: `get_state`, `set_state`.
  """
  import grain  # an extra: `pip install adaptivejax[data]`

  cut = windows(documents, config.context)
  order = grain.MapDataset.range(len(cut)).seed(config.seed).shuffle().repeat()
  dataset = order.batch(config.batch).map(lambda numbers: Batch(cut, numbers))
  in_line = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(dataset.to_iter_dataset(in_line))


def validation_batches(
  documents: Documents, config: DataConfig, count: int
) -> list[Batch]:
  """Up to `count` batches of windows, spread evenly over the documents."""
  cut = windows(documents, config.context)
  count = min(count, len(cut) // config.batch)
  chosen = np.linspace(0, len(cut) - 1, count * config.batch).astype(int)
  return [Batch(cut, numbers) for numbers in chosen.reshape(count, -1)]


def _read(corpus: str) -> Documents:
  if corpus == "python":
    return _python()
  path = Path(corpus)
  if path.is_file():
    return {path.name: path.read_bytes()}
  if path.is_dir():
    files = [p for p in path.rglob("*") if p.is_file() and not _hidden(p, path)]
    texts = {p.relative_to(path).as_posix(): p.read_bytes() for p in files}
    return {name: text for name, text in texts.items() if b"\0" not in text}
  raise ValueError(
    f"corpus {corpus!r} is no file or folder; name one, or use 'python' for the"
    " standard library's sources"
  )


def _python() -> Documents:
  from pydoc_data.topics import topics

  root = Path(sysconfig.get_path("stdlib"))
  tops = [path for path in root.iterdir() if path.name not in SKIPPED]
  paths = [path for top in tops for path in (top, *top.rglob("*"))]
  names = [path.relative_to(root) for path in paths if path.suffix == ".py"]
  sources = {
    name.as_posix(): (root / name).read_bytes()
    for name in names
    if not SKIPPED & set(name.parts)
  }
  sources.pop("pydoc_data/topics.py", None)  # the text itself, not its literals
  return sources | {
    f"pydoc_data/topics/{name}.rst": text.encode()
    for name, text in topics.items()
  }


def _hidden(path: Path, root: Path) -> bool:
  return any(part.startswith(".") for part in path.relative_to(root).parts)


def _held(name: str, share: float) -> bool:
  digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
  return int.from_bytes(digest) < share * 2**64


def _split_bytes(documents: Documents, share: float) -> Corpus:
  [(name, text)] = documents.items()
  cut = int(len(text) * (1 - share))
  return Corpus({name: text[:cut]}, {name: text[cut:]})
