# SPDX-License-Identifier: Apache-2.0
"""A pretrained model for tests: random, tiny, with a tokenizer of bytes."""

from pathlib import Path
from types import SimpleNamespace

from flax import nnx

from adaptivejax.adapt import AdaptConfig
from adaptivejax.models import DecoderConfig, DecoderLM

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "dog"]


class Bytes:
  """A token is a byte of ASCII."""

  def encode(self, text, add_special_tokens=True):
    assert not add_special_tokens
    ids = [min(ord(char), 127) for char in text]
    return SimpleNamespace(ids=ids)

  def decode(self, ids):
    return "".join(map(chr, ids))


def load():
  config = DecoderConfig(
    vocab=128,
    layers=4,
    features=16,
    hidden=32,
    heads=2,
    kv_heads=1,
    gated=True,
  )
  model = DecoderLM(config, rngs=nnx.Rngs(0))
  return SimpleNamespace(model=model, tokenizer=Bytes)


def write_corpus(path: Path) -> None:
  """Twelve documents; each marks its words with a letter of its own."""
  path.mkdir()
  for i in range(12):
    words = [WORDS[(i * j + j) % 8] + chr(65 + i) for j in range(120)]
    (path / f"{i}.txt").write_text(" ".join(words))


def config(corpus: str, **fields) -> AdaptConfig:
  small = {
    "context": 24,
    "prompt": 8,
    "windows": 3,
    "read": 32,
    "long": 64,
    "long_windows": 2,
    "steps": 2,
    "batch": 2,
    "seconds": 0.01,
    "sample": 4,
  }
  return AdaptConfig("adapt/tiny", load, corpus=corpus, **(small | fields))
