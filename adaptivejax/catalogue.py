# SPDX-License-Identifier: Apache-2.0
"""METHODS.md from what the methods say, promise and achieve.

    python -m adaptivejax.catalogue [FILE]    writes FILE, else METHODS.md

The docstring of a method file starts with `Name: what it spends compute on.`,
then cites the paper, `Authors, year, URL` on a line, and has the fields
`Primitive:` and `Axes:`.  The laws it obeys are those that `python -m
tests.laws` counted, its headline is what `benchmarks.headlines --write`
measured.
Files are parsed, not imported.
"""

import ast
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from adaptivejax.files import write_atomically

METHODS = Path(__file__).parent / "methods"
LAWS = Path(__file__).parents[1] / "tests" / "laws" / "held.json"
RESULTS = Path(__file__).parents[1] / "benchmarks/headlines/results.json"
HEADER = """\
# Methods

One paper, one file.  This page is made by `python -m adaptivejax.catalogue`
from the docstrings; from the laws that hold in `tests/laws/`, the least over
the cases of a method; and from its headline: what the paper claims, and what
became of it here, on small models and data (✓ holds, ✗ does not, - cannot be
said).

| method | axis | what it does | paper | primitive \
| laws | the paper claims | measured here | by |
|--|--|--|--|--|--|--|--|--|
"""
MARKS = {True: "✓", False: "✗", None: "-"}


class Entry(NamedTuple):
  """What the docstring of a method file says."""

  name: str  # of the module
  axis: str
  title: str
  summary: str
  papers: tuple[tuple[str, str], ...]  # authors and year, URL
  primitive: str
  axes: str


def entries() -> list[Entry]:
  """All methods, by axis and name.

  Raises:
    ValueError: a docstring lacks a part; names the file and the part.
  """
  paths = sorted(METHODS.glob("*/*.py"))
  return [_entry(path) for path in paths if path.stem != "__init__"]


def render() -> str:
  """The text of METHODS.md."""
  cite = lambda e: "; ".join(f"[{paper}]({url})" for paper, url in e.papers)
  held, claims = laws(), headlines()
  return HEADER + "".join(
    f"| [{e.title}](adaptivejax/methods/{e.axis}/{e.name}.py) | {e.axis}"
    f" | {e.summary} | {cite(e)} | {e.primitive}"
    f" | {held.get(f'{e.axis}.{e.name}', '-')}"
    f" | {' | '.join(claims.get(e.name, ('-',) * 3))} |\n"
    for e in entries()
  )


def laws() -> dict[str, str]:
  """How many laws each method obeys, such as `16 of 18`, by `axis.name`."""
  return json.loads(LAWS.read_text("utf-8")) if LAWS.is_file() else {}


def headlines() -> dict[str, tuple[str, str, str]]:
  """The claim, the finding with its mark, and the command, by method."""
  if not RESULTS.is_file():
    return {}
  cell = lambda text: " ".join(text.split()).replace("|", "\\|")
  return {
    name: (
      cell(found["paper"]),
      f"{MARKS[found['holds']]} {cell(found['text'])}",
      f"`{found['command']}`",
    )
    for name, found in json.loads(RESULTS.read_text("utf-8")).items()
  }


def _entry(path: Path) -> Entry:
  text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""

  def find(part: str, pattern: str) -> re.Match[str]:
    match = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    if match is None:
      raise ValueError(f"{path}: the docstring has no {part}")
    return match

  def field(name: str) -> str:
    body = find(f"`{name}:`", rf"^{name}: *(.+?)(?=\n\n|\n\w+:|\Z)")[1]
    return " ".join(body.split()).rstrip(".")

  title = find("first line `Name: what it does.`", r"\A([^\n:]+): ([^\n]+)")
  cited = find("second paragraph", r"\A[^\n]+\n\n(.+?)(?:\n\n|\Z)")[1]
  papers = re.findall(r"^(.+\d{4}.*), (https://\S+)$", cited, re.MULTILINE)
  if not papers:
    raise ValueError(f"{path}: no citation `Authors, year, URL` on a line")
  return Entry(
    name=path.stem,
    axis=path.parent.name,
    title=title[1],
    summary=title[2].rstrip("."),
    papers=tuple(papers),
    primitive=field("Primitive"),
    axes=field("Axes"),
  )


if __name__ == "__main__":
  write_atomically({Path(*sys.argv[1:2] or ["METHODS.md"]): render()})
