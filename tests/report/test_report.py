"""Laws: a report says what was measured, whole, safely, and without NaN."""

import dataclasses
import html.parser
import json
import math
import re
import sys

import pytest
from rich.console import Console

from adaptivejax import report as reports
from adaptivejax.report import (
  Curve,
  Grid,
  Point,
  Report,
  Sample,
  Snippet,
  store,
)

HOSTILE = "</script><img src=x onerror=alert(1)> & \"'$x_{$ [red]"


def point(method="CALM", speedup=1.5, **fields):
  values = {
    "setting": "threshold 0.8", "regime": "decode", "bits_per_byte": 2.02,
    "tokens_per_second": 1500.0, "spread": (1.4, 1.6), "flops_share": 0.6,
    "mean_depth": 4.5,
  }  # fmt: skip
  return Point(method=method, speedup=speedup, **values | fields)


def dense(**fields):
  values = {
    "setting": "8 layers", "bits_per_byte": 2.0, "tokens_per_second": 1000.0,
    "spread": (1.0, 1.0), "flops_share": 1.0, "mean_depth": 8.0, "dense": True,
  }  # fmt: skip
  return point("Dense", 1.0, **values | fields)


def full(name="CALM"):
  text = "def f():\n\treturn 'é'\n".encode() + b"\xff\x00"
  share = tuple((i % 8 + 1) / 8 for i in range(len(text)))
  matrix = tuple(tuple(float(s > l / 8) for s in share) for l in range(8))
  return Report(
    title=f"A report of {name}",
    command="make demo",
    environment={"python": "3.11", "cores": 2},
    points=(
      dense(),
      point(name),
      point(name, 0.8, setting="threshold 0.99", bits_per_byte=2.0),
      dense(regime="score"),
      point(name, math.nan, regime="score"),
    ),
    curves=(
      Curve(
        name, (1, 2, 3), (5.0, math.nan, 2.0), (None, None, 2.5), (1, 2, 3)
      ),
    ),
    snippets=(Snippet(text, share, matrix, name, "threshold 0.8"),),
    samples=(Sample(b"def ", b"f\xff():", name, "threshold 0.8", 1500.0),),
    grids=(Grid(name, ("exit", "sure"), (("layer 1", name),), "Caption."),),
    measured=("In pairs.",),
    notes=("Small.",),
  )


class Page(html.parser.HTMLParser):
  """The tags, the text and whether every tag is closed."""

  VOID = ("meta", "br", "img", "link")

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.words, self.links = [], [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [v for k, v in attrs if k.endswith(("href", "src"))]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [v for k, v in attrs if k.endswith(("href", "src"))]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)

  @property
  def text(self):
    return "".join(self.words)


def written(report, folder):
  return Page(reports.write_report(report, folder).read_text("utf-8"))


def test_the_page_is_well_formed_and_needs_nothing_else(tmp_path):
  page = written(full(), tmp_path)
  assert page.open == []
  assert not {"script", "link", "img", "iframe"} & set(page.tags)
  assert page.tags.count("svg") == 4 + 2 + 8  # plots, curves, layers
  assert all(link.startswith("#") for link in page.links)


def test_every_reference_inside_the_plots_resolves(tmp_path):
  text = reports.write_report(full(), tmp_path).read_text("utf-8")
  ids = re.findall(r' id="([^"]+)"', text)
  used = re.findall(r'(?:url\(#|href="#)([^")]+)', text)
  assert len(ids) == len(set(ids)) and set(used) <= set(ids)
  assert not re.search(r"#000[01][0-9a-f]{2}\b", text)  # a forgotten stand-in


def test_hostile_text_is_only_text(tmp_path):
  page = written(
    dataclasses.replace(
      full(HOSTILE),
      title=HOSTILE,
      command=HOSTILE,
      environment={HOSTILE: HOSTILE},
      measured=(HOSTILE,),
      notes=(HOSTILE,),
    ),
    tmp_path,
  )
  assert page.open == [] and not {"script", "img"} & set(page.tags)
  assert page.text.count(HOSTILE) >= 10


def test_hostile_bytes_of_a_model_are_only_text(tmp_path):
  text = HOSTILE.encode() + bytes(range(256))
  one = (0.5,) * len(text)
  page = written(
    Report(
      "t", "c", {},
      snippets=(Snippet(text, one, (one,), "m", "s"),),
      samples=(Sample(text, text, "m", "s", 1.0),),
    ),
    tmp_path,
  )  # fmt: skip
  assert page.open == [] and not {"script", "img"} & set(page.tags)
  assert page.text.count(HOSTILE) == 3
  assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page.text)


def test_round_trip(tmp_path):
  # NaN is not equal to itself; on disk it is None.
  report = full()
  reports.write_report(report, tmp_path)
  loaded = reports.load_report(tmp_path)
  assert loaded.points[-1].speedup is None and loaded.curves[0].loss[1] is None
  assert loaded.snippets == report.snippets
  assert loaded.samples == report.samples
  assert store.to_json(loaded) == store.to_json(report)
  reports.write_report(loaded, tmp_path)
  assert reports.load_report(tmp_path) == loaded


def test_json_is_strict_and_has_the_figures_of_the_page(tmp_path):
  reports.write_report(full(), tmp_path)
  refuse = lambda name: pytest.fail(f"{name} in JSON")
  text = (tmp_path / "report.json").read_text()
  points = json.loads(text, parse_constant=refuse)["points"]
  assert [p["slower"] for p in points] == [False, False, True, False, False]
  assert points[1]["quality_loss"] == pytest.approx(0.01)


def test_points_slower_than_dense_are_flagged_everywhere(tmp_path, capsys):
  report = full()
  assert report.slower() == [report.points[2]]
  page = written(report, tmp_path)
  # A mark's title and a verdict in the table; the heading card counts them.
  assert page.text.count("(slower than dense)") == 2  # speed, FLOPs
  assert page.text.count("slower than dense") > 4
  assert "1 of 3" in page.text
  reports.print_table(report, Console(width=100))
  out = capsys.readouterr().out
  assert "1 of 3 adaptive points are slower than dense" in out
  assert out.count("slower") == 2


def test_dense_is_never_slower_than_itself():
  assert not dataclasses.replace(dense(), speedup=0.99).slower
  assert point(speedup=0.99).slower
  assert not point(speedup=1.0).slower
  assert not point(speedup=None).slower


def test_best_is_the_fastest_near_dense():
  far = point("far", 3.0, bits_per_byte=2.1)
  near = point("near", 1.2, bits_per_byte=2.01)
  slow = point("slow", 0.9, bits_per_byte=1.9)
  report = Report("t", "c", {}, (dense(), far, near, slow))
  assert report.best("decode") == near
  assert report.best("decode", tolerance=0.1) == far
  assert report.best("score") is None
  assert Report("t", "c", {}, (near,)).best("decode") is None


@pytest.mark.parametrize(
  "field",
  ["points", "curves", "snippets", "samples", "grids", "measured", "notes"],
)
def test_a_section_without_data_is_left_out(field, tmp_path):
  whole = written(full(), tmp_path).tags.count("section")
  page = written(dataclasses.replace(full(), **{field: ()}), tmp_path)
  assert page.tags.count("section") == whole - (2 if field == "points" else 1)
  assert reports.load_report(tmp_path) is not None


def test_an_empty_report_is_a_page(tmp_path, capsys):
  page = written(Report("nothing", "c", {}), tmp_path)
  assert page.open == [] and "section" not in page.tags
  reports.print_table(Report("nothing", "c", {}))
  assert capsys.readouterr().out == ""


def test_points_without_figures_or_twin_are_shown_by_a_dash(tmp_path):
  bare = point(
    speedup=None, bits_per_byte=None, tokens_per_second=None,
    spread=(None, None), flops_share=math.inf, mean_depth=None,
  )  # fmt: skip
  page = written(Report("t", "c", {}, (bare,)), tmp_path)
  assert "not timed" in page.text and "–" in page.text
  assert not re.search(r"\b(nan|None|inf)\b", page.text)


def test_a_point_beyond_the_scale_is_named_on_the_plot(tmp_path):
  far = point("far", 3.0, bits_per_byte=7.77)
  page = written(Report("t", "c", {}, (dense(), far)), tmp_path)
  assert page.text.count("↑ 7.77") == 2


def test_perplexity_is_shown_where_tokens_are_not_bytes(tmp_path, capsys):
  points = (
    dense(regime="prompt", perplexity=10.0),
    point(regime="prompt", perplexity=10.3),
    dense(),
    point(),
  )
  made = Report("t", "c", {}, points)
  assert made.rise(points[1]) == pytest.approx(0.03)
  assert made.rise(points[3]) is None
  page = written(made, tmp_path)
  assert page.text.count("perplexity") == 1 and "10.30" in page.text
  assert "+3.0 %" in page.text and "Reading a prompt" in page.text
  reports.print_table(made)
  said = capsys.readouterr().out
  assert said.count("perplexity") == 1 and "+3.0 %" in said
  assert reports.load_report(tmp_path) == made


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
  reports.write_report(full("old"), tmp_path)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  with monkeypatch.context() as patch:
    patch.setattr(store, "page", lambda report: "\ud800")  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
      reports.write_report(full("new"), tmp_path)
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
  assert set(before) == {"report.html", "report.json"}


@pytest.mark.parametrize(
  "text, message",
  [
    (None, "is .* the folder of a run"),
    ("{", "is not a report"),
    ("[]", "is not a report"),
    ('{"format": 99}', "format 99"),
    ('{"format": 1, "points": [{"speed": 1}]}', "has no field speed"),
    ('{"format": 1, "points": []}', "title"),
  ],
)
def test_a_bad_report_is_refused_by_name(text, message, tmp_path):
  if text is not None:
    (tmp_path / "report.json").write_text(text)
  with pytest.raises(ValueError, match=message):
    reports.load_report(tmp_path)


def test_bad_data_is_refused():
  with pytest.raises(ValueError, match=r"regime='train'.*decode.*score"):
    point(regime="train")
  with pytest.raises(ValueError, match=r"`loss` has 1 entries for 2 steps"):
    Curve("c", (1, 2), (1.0,), (None, None), (1.0, 2.0))
  with pytest.raises(ValueError, match=r"each row needs 2 cells"):
    Grid("g", ("a", "b"), (("1",),))
  with pytest.raises(ValueError, match=r"3 bytes in 3 tokens"):
    Snippet(b"abc", (0.5, 0.5), (), "m", "s")
  with pytest.raises(ValueError, match=r"3 bytes in 2 tokens"):
    Snippet(b"abc", (0.5, 0.5), ((1.0, 1.0),), "m", "s", lengths=(1, 1))


def test_without_matplotlib_the_remedy_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  with pytest.raises(ImportError, match=r"pip install 'adaptivejax\[viz\]'"):
    reports.write_report(full(), tmp_path)
  assert not (tmp_path / "report.json").exists()
