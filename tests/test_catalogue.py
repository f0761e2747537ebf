# SPDX-License-Identifier: Apache-2.0
"""Law: every method is documented, listed in METHODS.md, and under the laws."""

import json
from pathlib import Path

import pytest

from adaptivejax import catalogue
from tests.laws import CASES, held

METHODS = Path(__file__).parents[1] / "METHODS.md"
METHOD = '''"""Some Method: spends compute on what matters.

Someone et al., 2024, https://example.org/1234
Another, 2023 (sec. 2), https://example.org/5

    y = f(x)

Primitive: bucketed, over
  two lines (`core.buckets`).
Departs: nowhere.
Axes: T tokens, D features.
"""
'''


def test_methods_page_is_fresh():
  assert METHODS.read_text(encoding="utf-8") == catalogue.render(), (
    "run `python -m adaptivejax.catalogue`"
  )


def test_every_method_has_a_case_in_the_laws():
  """But for those whose primitive says that they run on the host."""
  found = catalogue.entries()
  device = {e.name for e in found if not e.primitive.startswith("host")}
  assert device <= {case.method.rpartition(".")[2] for case in CASES}


def test_the_count_of_laws_is_fresh():
  """`python -m tests.laws` writes it."""
  assert catalogue.laws() == held()


def test_headlines_are_of_methods_there_are():
  found = {entry.name for entry in catalogue.entries()}
  assert set(catalogue.headlines()) <= found


def test_the_page_shows_laws_and_headlines(tmp_path, monkeypatch):
  monkeypatch.setattr(catalogue, "METHODS", _methods(tmp_path, METHOD))
  laws, results = tmp_path / "held.json", tmp_path / "results.json"
  monkeypatch.setattr(catalogue, "LAWS", laws)
  monkeypatch.setattr(catalogue, "RESULTS", results)
  last = lambda: catalogue.render().splitlines()[-1]
  assert last().endswith(" | - | - | - | - |")
  laws.write_text('{"depth.some_method": "3 of 3"}')
  for holds, mark in ((True, "✓"), (False, "✗"), (None, "-")):
    found = {
      "paper": "a | b\nc",
      "text": "3 of 4",
      "holds": holds,
      "command": "run",
    }
    results.write_text(json.dumps({"some_method": found}))
    assert last().endswith(rf" | 3 of 3 | a \| b c | {mark} 3 of 4 | `run` |")
  results.write_text("{}")
  assert last().endswith(" | 3 of 3 | - | - | - |")


def _methods(folder, text):
  (folder / "depth").mkdir()
  (folder / "depth" / "__init__.py").write_text("")
  (folder / "depth" / "some_method.py").write_text(text)
  return folder


def test_reads_a_docstring(tmp_path, monkeypatch):
  monkeypatch.setattr(catalogue, "METHODS", _methods(tmp_path, METHOD))
  assert catalogue.entries() == [
    catalogue.Entry(
      name="some_method",
      axis="depth",
      title="Some Method",
      summary="spends compute on what matters",
      papers=(
        ("Someone et al., 2024", "https://example.org/1234"),
        ("Another, 2023 (sec. 2)", "https://example.org/5"),
      ),
      primitive="bucketed, over two lines (`core.buckets`)",
      axes="T tokens, D features",
    )
  ]


@pytest.mark.parametrize(
  ("part", "named"),
  [
    (": spends compute", "first line"),
    ("https://", "citation"),
    ("Primitive:", "Primitive"),
    ("Axes:", "Axes"),
  ],
)
def test_names_the_missing_part(tmp_path, monkeypatch, part, named):
  text = METHOD.replace(part, "")
  monkeypatch.setattr(catalogue, "METHODS", _methods(tmp_path, text))
  with pytest.raises(ValueError, match=f"some_method.py.*{named}"):
    catalogue.entries()
