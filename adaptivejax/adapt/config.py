# SPDX-License-Identifier: Apache-2.0
"""What `adaptivejax adapt` is to do: one frozen dataclass.

A config file is Python: `def config() -> AdaptConfig`.  The fields below can be
set on the command line (`--steps 20`), the callables cannot.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptivejax.training.config import run_config

RECIPES = (
  "drafts",
  "exits",
  "plans",
  "skips",
  "neurons",
  "modules",
  "experts",
  "depths",
  "long_decode",
  "long_prompts",
)


@dataclass(frozen=True)
class AdaptConfig:
  """A pretrained model, a text, and what to try.  All fields are static."""

  name: str
  """Name of the run; its report is kept in runs/NAME."""

  load: Callable[[], Any]
  """Reads the model: `adaptivejax.io.Pretrained`, with its tokenizer."""

  recipes: tuple[str, ...] = RECIPES
  """What to try, by name (`adaptivejax.adapt.RECIPES`)."""

  corpus: str = "python"
  """`python` for the topics of Python's documentation, which come with it, or
  the path of a text file or of a folder of them."""

  context: int = 128
  """Tokens of a window of text, to learn from and to be judged on."""

  prompt: int = 32
  """Of these, the tokens that are read before decoding is judged."""

  windows: int = 8
  """Held-out windows that decoding is judged on."""

  read: int = 1024
  """Tokens of a prompt that is read at once."""

  long: int = 6144
  """Tokens of a long prompt."""

  long_windows: int = 2
  """Long held-out texts."""

  steps: int = 16
  """Updates of each distillation."""

  batch: int = 4
  """Windows in an update."""

  seconds: float = 4.0
  """To spend on timing each method beside the model as it was, at least three
  texts or all prompts."""

  sample: int = 96
  """Tokens of the texts that are shown."""

  seed: int = 0
  """Seed of everything that is drawn."""

  def __post_init__(self):
    """Refuses what cannot be: names, sizes, recipes."""
    path = Path(self.name)
    if path.is_absolute() or ".." in path.parts or path == Path():
      raise ValueError(f"name={self.name!r} must name a folder inside runs/")
    for name in ("windows", "long_windows", "steps", "batch", "sample"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    if not 1 <= self.prompt < self.context - 1:
      raise ValueError(
        f"prompt={self.prompt} must leave tokens to judge of"
        f" context={self.context}"
      )
    if not 1 < self.read <= self.long or self.seconds <= 0:
      raise ValueError(
        f"read={self.read} must be in 2..long={self.long}, and"
        f" seconds={self.seconds} above 0"
      )
    for name in self.recipes:
      if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")


def load_config(path: Path) -> AdaptConfig:
  """What the function `config` of a file returns (`training.config`)."""
  return run_config(path, AdaptConfig)
