# SPDX-License-Identifier: Apache-2.0
"""Real text for a pretrained model: to learn from, and never seen.

Documents are dealt to the two sides by a hash of their name, so no document is
on both, and the same ones on every machine.

Axes: N windows to learn from, W held-out windows, S tokens of a window, X long
held-out texts.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from adaptivejax.adapt.config import AdaptConfig

HELD = 0.2


class Text(NamedTuple):
  """What a run reads.

  Attributes:
    train: i32[N, S].
    test: i32[W, S], the first token being given.
    long: i32[X, long + context].
    bytes_per_token: of the held-out text.
    tokenizer: `tokenizers.Tokenizer`, or another that encodes and decodes.
  """

  train: Int32[np.ndarray, "N S"]
  test: Int32[np.ndarray, "W S"]
  long: Int32[np.ndarray, "X Z"]
  bytes_per_token: float
  tokenizer: Any

  def encode(self, text: str) -> Int32[np.ndarray, " T"]:
    """The tokens of a text, without special ones."""
    return encode(self.tokenizer, text)

  def pieces(self, tokens) -> list[bytes]:
    """The bytes that each token adds to the text before it."""
    made, past = [], b""
    for i in range(1, len(tokens) + 1):
      now = self.tokenizer.decode(list(map(int, tokens[:i])))
      now = now.rstrip("\N{REPLACEMENT CHARACTER}").encode()
      made.append(now[len(past) :])
      past = now
    return made


def read_text(config: AdaptConfig, tokenizer: Any) -> Text:
  """The windows of a corpus.

  Raises:
    ValueError: there is no such corpus, or not enough of it.
  """
  documents = _documents(config.corpus)
  held = {name for name in documents if _held(name)}
  if len(documents) == 1:  # its end is held out
    ((name, text),) = documents.items()
    cut = int(len(text) * (1 - HELD))
    documents, held = {"": text[:cut], name: text[cut:]}, {name}
  both = []
  for side in (documents.keys() - held, held):
    text = "\n\n".join(documents[name] for name in sorted(side))
    both.append((encode(tokenizer, text), len(text.encode())))
  (train, _), (test, size) = both
  wide = config.long + config.context
  long = _spread(test, wide, config.long_windows, "long_windows")
  return Text(
    _spread(train, config.context, len(train) // config.context, "context"),
    _spread(test, config.context, config.windows, "windows"),
    long,
    size / len(test),
    tokenizer,
  )


def encode(tokenizer: Any, text: str) -> Int32[np.ndarray, " T"]:
  """The tokens of a text, without special ones."""
  return np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, "i4")


def _spread(tokens, size: int, count: int, name: str):
  """So many windows of `size` tokens, side by side, evenly over the text."""
  there = len(tokens) // size
  if there < max(count, 1):
    raise ValueError(
      f"the corpus is too small: {there} windows of {size} tokens on one side,"
      f" and {name} asks for {max(count, 1)}"
    )
  chosen = np.linspace(0, there - 1, count).astype(int)
  return tokens[: there * size].reshape(there, size)[chosen]


def _documents(corpus: str) -> dict[str, str]:
  if corpus == "python":
    from pydoc_data import topics

    return dict(topics.topics)
  path = Path(corpus)
  if path.is_file():
    return {path.name: path.read_text("utf-8", "replace")}
  if path.is_dir():
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {
      p.relative_to(path).as_posix(): p.read_text("utf-8", "replace")
      for p in files
    }
  raise ValueError(
    f"corpus {corpus!r} is no file or folder; name one, or use 'python'"
  )


def _held(name: str) -> bool:
  digest = hashlib.sha256(name.encode()).digest()
  return digest[0] < 256 * HELD
