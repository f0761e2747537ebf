# SPDX-License-Identifier: Apache-2.0
"""Law: no file crashes a parser; some of what `make fuzz` tries, by hypothesis.

Needs no atheris; `python -m tests.fuzz` is guided by coverage and tries more.
"""

import functools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import __main__, targets
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, Crash, Target, try_file

SLOW = {"report": 12, "index": 12, "metrics": 12}


@functools.cache
def seeds(name):
  return TARGETS[name].seeds()


@st.composite
def files(draw, name):
  """A seed with a part changed, or, where it is JSON, another JSON."""
  data = bytearray(draw(st.sampled_from(seeds(name))))
  if TARGETS[name].structured and draw(st.integers(0, 3)):
    made = mutated(bytes(data), 10**6, draw(st.integers(0, 2**32)))
    return data if made is None else made
  at = draw(st.integers(0, len(data)))
  part = draw(st.binary(max_size=8))
  data[at : at + draw(st.integers(0, 12))] = part
  return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_seed_is_read_or_refused(name, tmp_path):
  said = [try_file(TARGETS[name], data, tmp_path) for data in seeds(name)]
  assert not all(said), "nothing is read: the target tests nothing"


@pytest.mark.parametrize("name", TARGETS)
def test_no_file_crashes(name, tmp_path_factory):
  seeds(name)  # are made now: while it draws, hypothesis wants no other chance

  @settings(
    max_examples=SLOW.get(name, 40),
    suppress_health_check=list(HealthCheck),
  )
  @given(data=files(name))
  def law(data):
    try_file(TARGETS[name], data, tmp_path_factory.mktemp("fuzz"))

  law()


def made(read):
  return Target(lambda: [b""], read)


def test_what_is_no_error_of_ours_is_a_crash(tmp_path):
  for read in (lambda *_: 1 / 0, lambda *_: {}["a"]):
    with pytest.raises((ZeroDivisionError, KeyError)):
      try_file(made(read), b"", tmp_path)
  with pytest.raises(Crash, match="no error of ours"):
    try_file(made(lambda *_: b"\xff".decode()), b"", tmp_path)


def test_what_is_done_besides_reading_is_a_crash(tmp_path):
  (tmp_path / "in").mkdir()

  def outside(*_):
    (tmp_path / "out").write_text("x")

  def inside(_, folder):
    (folder / "x").write_text("x")

  with pytest.raises(Crash, match="made us write"):
    try_file(made(outside), b"", tmp_path / "in")
  assert try_file(made(inside), b"", tmp_path / "in") == ""


def test_the_command_needs_atheris_or_says_so(monkeypatch, capsys):
  monkeypatch.setattr(__main__, "find_spec", lambda name: None)
  assert __main__.main(["gguf"]) == 2
  assert "pip install 'adaptivejax[fuzz]'" in capsys.readouterr().out
  assert targets.GUARD
