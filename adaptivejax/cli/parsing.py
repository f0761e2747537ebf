# SPDX-License-Identifier: Apache-2.0
"""Dataclasses from the command line, and what is said of a mistake."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tyro


def parse(kind: Any, args: Sequence[str], command: str, **options: Any) -> Any:
  """A dataclass from the command line; a mistake is a one-line ValueError."""
  errors = io.StringIO()
  try:
    with contextlib.redirect_stderr(errors):
      value, unknown = tyro.cli(
        kind,
        args=args,
        prog=f"adaptivejax {command}",
        use_underscores=True,
        return_unknown_args=True,
        config=(tyro.conf.SuppressFixed,),
        **options,
      )
  except SystemExit as exit:
    if exit.code:
      raise ValueError(_first_sentence(errors.getvalue())) from None
    raise
  if unknown:
    names = [f"--{name}" for name in _names(options.get("default", kind))]
    raise ValueError(f"no field {unknown[0]}{suggestion(unknown[0], names)}")
  return value


def take(args: Sequence[str], name: str) -> tuple[str | None, list[str]]:
  """The value of `name value` or `name=value`, and the other arguments."""
  found, rest, words = None, [], iter(args)
  for word in words:
    if word.startswith(f"{name}="):
      found = word.partition("=")[2]
    elif word == name:
      found = next(words, None)
      if found is None:
        raise ValueError(f"{name} needs a value; --help shows one")
    else:
      rest.append(word)
  return found, rest


def suggestion(word: str, names: Iterable[str]) -> str:
  """The name that is meant by `word`, whole or by its last part, as words."""
  word = word.partition("=")[0].replace("-", "_").lstrip("_")
  bare = {name.rpartition(".")[2].lstrip("-"): name for name in names}
  bare |= {name.lstrip("-"): name for name in names}
  close = difflib.get_close_matches(word, bare, n=1)
  if close:
    return f"; did you mean {bare[close[0]]}?"
  return "; --help lists them"


def _names(config: Any) -> Iterator[str]:
  """The dotted names of the fields of a dataclass, or of an instance."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name, None)
    if dataclasses.is_dataclass(value):
      yield from (f"{field.name}.{name}" for name in _names(value))
    elif not callable(value):
      yield field.name


def _first_sentence(box: str) -> str:
  """What tyro says below its title, up to a rule or a blank line."""
  plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
  lines = [line.strip(" │|") for line in plain.splitlines()[1:]]
  is_rule = lambda line: not line.strip("─-")
  body = itertools.dropwhile(is_rule, lines)
  return " ".join(itertools.takewhile(lambda line: not is_rule(line), body))
