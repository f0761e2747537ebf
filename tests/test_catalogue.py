# SPDX-License-Identifier: Apache-2.0
"""Law: every method is documented, listed in METHODS.md, and under the laws."""

import json
from pathlib import Path

import pytest

from adaptivejax import catalogue
from tests.laws import CASES, LAWS

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


def test_counts_the_laws_as_the_cases_do():
  held = catalogue.laws()
  assert set(held) == {case.method for case in CASES}
  for method, text in held.items():
    least = min(
      len(LAWS) - len(case.unless) for case in CASES if case.method == method
    )
    assert text == f"{least} of {len(LAWS)}"


def test_headlines_are_of_methods_there_are():
  found = {entry.name for entry in catalogue.entries()}
  assert set(catalogue.headlines()) <= found


PAGE = """
LAWS = ("full", "none", "row")
_both = {"full": "not here"}
CASES = [
  Case("one", "depth.one", unless={**_both, "row": "nor there"}),
  Case("another", method="depth.one", unless=_both),
  Case(name="two", method="depth.two"),
]
def made(name, rest):
  return Case(name, f"depth.{name}", unless={"row": "nor here", **_both})
CASES += [made("three", 0), made("one", 0)]
"""


def test_the_page_shows_laws_and_headlines(tmp_path, monkeypatch):
  monkeypatch.setattr(catalogue, "METHODS", _methods(tmp_path, METHOD))
  laws, results = tmp_path / "laws.py", tmp_path / "results.json"
  monkeypatch.setattr(catalogue, "LAWS", laws)
  monkeypatch.setattr(catalogue, "RESULTS", results)
  laws.write_text(PAGE)
  assert catalogue.laws() == {
    "depth.one": "1 of 3",
    "depth.two": "3 of 3",
    "depth.three": "1 of 3",
  }
  last = lambda: catalogue.render().splitlines()[-1]
  assert last().endswith(" | - | - | - | - |")
  laws.write_text(PAGE.replace("two", "some_method"))
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


def test_names_the_exception_it_cannot_count(tmp_path, monkeypatch):
  monkeypatch.setattr(catalogue, "LAWS", tmp_path / "laws.py")
  catalogue.LAWS.write_text('LAWS = ("a",)\nCase("b", "c.d", unless=f())')
  with pytest.raises(ValueError, match=r"laws.py:2.*f\(\)"):
    catalogue.laws()


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
