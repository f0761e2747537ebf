"""Law: the report of a run can always be made again from its folder."""

import json

import pytest

from adaptivejax import report as reports

LINES = [
  {"step": 1, "split": "train", "seconds": 1.0, "loss": 5.0},
  {"step": 2, "split": "train", "seconds": 2.0, "loss": 4.0},
  {"step": 2, "split": "validation", "seconds": 2.5, "bits_per_byte": 5.5},
]


def run(folder, lines=LINES):
  folder.mkdir(parents=True)
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  return folder


def test_curve_joins_the_lines_of_a_step(tmp_path):
  curve = reports.curve(run(tmp_path / "a"), "a")
  assert curve == reports.Curve(
    "a", (1, 2), (5.0, 4.0), (None, 5.5), (1.0, 2.5)
  )


def test_the_curve_of_experts_has_their_imbalance(tmp_path):
  even = {"imbalance": 1.5, "dropped": 0.0}
  curve = reports.curve(run(tmp_path / "a", [LINES[0] | even, LINES[2]]), "a")
  assert curve.imbalance == (1.5, None)
  html = reports.rebuild(tmp_path / "a").read_text()
  assert 'aria-label="Load imbalance"' in html
  again = reports.rebuild(run(tmp_path / "b")).read_text()
  assert "imbalance" not in again


def test_a_training_run_is_drawn_as_it_is_by_now(tmp_path):
  folder = run(tmp_path / "a", LINES[:1])
  assert reports.rebuild(folder) == folder / "report.html"
  with (folder / "metrics.jsonl").open("a") as file:
    file.write(json.dumps(LINES[1]) + "\n" + '{"step": 3, "spl')
  reports.rebuild(folder)
  (curve,) = reports.load_report(folder).curves
  assert curve.loss == (5.0, 4.0)


def test_runs_below_a_folder_are_drawn_together(tmp_path):
  for name in ("dense", "calm"):
    run(tmp_path / "demo" / name)
  reports.rebuild(tmp_path / "demo")
  names = [c.name for c in reports.load_report(tmp_path / "demo").curves]
  assert names == ["demo/calm", "demo/dense"]


def test_measured_points_are_rendered_again(tmp_path):
  point = reports.Point("m", "s", "decode", 2.0, 9.0, 1.1, (1.0, 1.2), 0.5)
  report = reports.Report("kept", "c", {}, (point,))
  html = reports.write_report(report, tmp_path)
  before = html.read_text()
  html.unlink()
  assert reports.rebuild(tmp_path).read_text() == before
  assert reports.load_report(tmp_path) == report


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"neither report\.json nor a line"):
    reports.rebuild(tmp_path)
  with pytest.raises(ValueError, match="is not a folder"):
    reports.rebuild(tmp_path / "nowhere")
