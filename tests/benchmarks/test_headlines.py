# SPDX-License-Identifier: Apache-2.0
"""Law: a headline is a claim, figures and a verdict, kept as found."""

import importlib
import json
import types

import numpy as np
import pytest

from adaptivejax import catalogue
from benchmarks.headlines import Headline, __main__, beds


def test_every_headline_is_of_a_method_and_says_what_the_paper_claims():
  methods = {entry.name for entry in catalogue.entries()}
  assert set(__main__.names()) <= methods
  for name in __main__.names():
    module = importlib.import_module(f"benchmarks.headlines.{name}")
    assert module.PAPER and "\n" not in module.PAPER
    assert callable(module.measure)


def _runner(monkeypatch, tmp_path, measure):
  module = types.SimpleNamespace(PAPER="half the [work]", measure=measure)
  monkeypatch.setattr(__main__, "names", lambda: ["some"])
  monkeypatch.setattr(__main__.importlib, "import_module", lambda name: module)
  path = tmp_path / "results.json"
  keep = __main__.keep
  monkeypatch.setattr(
    __main__, "keep", lambda result, name: keep(result, name, path)
  )
  return path


def test_keeps_a_result_beside_the_others(monkeypatch, tmp_path, capsys):
  found = Headline("a [third]", {"share": 1 / 3, "odd": float("nan")}, False)
  path = _runner(monkeypatch, tmp_path, lambda quick: found)
  path.write_text('{"other": 1, "some": 2}')
  __main__.main(["--write"])
  kept = json.loads(path.read_text())
  assert kept["other"] == 1
  assert kept["some"]["paper"] == "half the [work]"
  assert kept["some"]["text"] == "a [third]"
  assert kept["some"]["figures"] == {"share": 1 / 3, "odd": None}
  assert kept["some"]["holds"] is False
  assert kept["some"]["command"] == "python -m benchmarks.headlines some"
  said = capsys.readouterr().out
  assert "1/1 some ✗ a [third]" in said and "half the [work]" in said


def test_a_quick_run_passes_it_on_and_keeps_nothing(monkeypatch, tmp_path):
  quick = []
  path = _runner(
    monkeypatch, tmp_path, lambda q: quick.append(q) or Headline("", {}, None)
  )
  __main__.main(["--quick"])
  __main__.main([])
  assert quick == [True, False] and not path.exists()


def test_a_failure_is_named_and_ends_the_run_in_error(
  monkeypatch, tmp_path, capsys
):
  path = _runner(monkeypatch, tmp_path, lambda quick: 1 / 0)
  with pytest.raises(SystemExit, match="some"):
    __main__.main(["--write"])
  assert "ZeroDivisionError" in capsys.readouterr().out and not path.exists()


@pytest.mark.parametrize("line", [["nobody"], ["--quick", "--write"]])
def test_refuses_what_it_cannot_do(line):
  with pytest.raises(SystemExit) as error:
    __main__.main(line)
  assert error.value.code == 2


def test_windows_of_the_two_splits_share_no_text():
  held, seen = beds.texts(40, 32), beds.texts(40, 32, split="train")
  assert held.shape == seen.shape == (40, 32)
  assert held.max() < 256 and held.min() >= 0
  assert not {w.tobytes() for w in held} & {w.tobytes() for w in seen}
  with pytest.raises(ValueError, match="count"):
    beds.texts(10**9, 32)


def test_digits_are_split_once():
  pytest.importorskip("sklearn", reason="its images: needs `.[demo]`")
  parts = beds.digits()
  assert [len(part.labels) for part in parts] == [1000, 397, 400]
  every = np.concatenate([part.pixels.reshape(-1, 64) for part in parts])
  assert len(np.unique(every, axis=0)) == 1797
  assert every.min() == 0 and every.max() == 1
  for part in parts:
    assert set(part.labels) == set(range(10))
