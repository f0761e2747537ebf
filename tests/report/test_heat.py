"""Law: each character carries the compute of the tokens that make it up."""

import re

from adaptivejax.report import Snippet
from adaptivejax.report.heat import heat_map
from adaptivejax.report.words import characters, number, percent, visible


def test_bytes_of_one_character_are_one_cell():
  assert characters("aé".encode(), (1, 1, 1)) == [("a", [0]), ("é", [1, 2])]


def test_characters_of_one_token_share_it():
  assert characters(b"abc", (2, 1)) == [("a", [0]), ("b", [0]), ("c", [1])]


def test_what_is_not_utf8_keeps_its_place():
  cells = characters(b"\xffa\xe2", (1, 1, 1))
  assert cells == [("\ufffd", [0]), ("a", [1]), ("\ufffd", [2])]
  # A character cut short shows together with what cut it.
  assert characters(b"\xe2A", (1, 1)) == [("\ufffdA", [0, 1])]


def test_every_token_is_in_some_cell():
  text = bytes(range(256)) * 2
  cells = characters(text, (1,) * len(text))
  assert sorted(t for _, tokens in cells for t in tokens) == list(range(512))


def test_tints_span_the_range_and_titles_give_the_number():
  page = heat_map(Snippet(b"abc", (0.25, 0.5, 1.0), (), "m", "s"))
  assert re.findall(r"--c:([\d.]+)", page) == ["0.00", "0.33", "1.00"]
  assert re.findall(r": (\d+ %)\"", page) == ["25 %", "50 %", "100 %"]


def test_a_uniform_share_is_tinted_by_its_value():
  page = heat_map(Snippet(b"ab", (0.5, 0.5), ((0.5, 0.5),), "m", "s"))
  assert re.findall(r"--c:([\d.]+)", page) == ["0.50", "0.50"]


def test_layers_run_from_the_last_to_the_first_with_their_cells():
  matrix = ((1.0, 1.0, 1.0), (0.0, 1.0, 0.0))
  page = heat_map(Snippet(b"abc", (0.5, 1.0, 0.5), matrix, "m", "s"))
  assert re.findall(r"<b>(layer \d)</b>", page) == ["layer 2", "layer 1"]
  assert re.findall(r' d="([^"]+)"', page) == ["M1 0h1v1h-1z", "M0 0h3v1h-3z"]
  assert "layer 2: 33 %" in page


def test_an_empty_snippet_is_drawn():
  assert heat_map(Snippet(b"", (), (), "m", "s")).startswith("<pre")


def test_numbers():
  assert [number(x) for x in (0.12345, 1.5, 12.0, 1234.5, None)] == [
    "0.123", "1.50", "12.0", "1\u202f234", "–",
  ]  # fmt: skip
  assert percent(0.256) == "26 %"
  assert percent(-0.0123, signed=True) == "−1.2 %"
  assert visible("\x00") == "␀" and visible("\n") == "\n"
