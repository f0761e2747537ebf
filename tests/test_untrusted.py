# SPDX-License-Identifier: Apache-2.0
"""Law: a file of a stranger is read where it is, whole, as one thing, or not.

`tests/fuzz` makes up thousands of such files; these are known tricks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import adaptivejax as adaptive
from adaptivejax import report, untrusted
from adaptivejax.io import source
from adaptivejax.report.typed import typed
from adaptivejax.training import checkpoint
from adaptivejax.training import run as run_folder
from tests.io import folders
from tests.report.test_report import HOSTILE, full, written

ROOT = Path(__file__).parents[1]


@pytest.fixture
def secret(tmp_path):
  path = tmp_path / "secret"
  path.write_text("{}")
  return path


@pytest.mark.parametrize(
  "name", ["config.json", "model.safetensors", "tokenizer.json", "merges.txt"]
)
def test_no_file_of_a_model_leads_out(name, secret, tmp_path):
  folder = folders.copy_of("mistral", tmp_path)
  (folder / name).unlink(missing_ok=True)
  (folder / name).symlink_to(secret)
  with pytest.raises(ValueError, match=f"{name} is a link out of this folder"):
    adaptive.load(folder)


def test_what_lies_beside_a_model_is_of_a_size(tmp_path, monkeypatch):
  folder = folders.copy_of("mistral", tmp_path)
  monkeypatch.setattr(source, "BESIDE_BYTES", 99)
  (folder / "vocab.txt").write_bytes(bytes(99))
  assert len(adaptive.load(folder).files["vocab.txt"]) == 99
  (folder / "vocab.txt").write_bytes(bytes(100))
  with pytest.raises(ValueError, match=r"vocab\.txt is over 99 bytes"):
    adaptive.load(folder)


def test_a_pipe_is_no_file(tmp_path):
  os.mkfifo(tmp_path / "a")
  with pytest.raises(ValueError, match="is no file"):
    untrusted.read_bytes(tmp_path / "a", 10)


@pytest.mark.parametrize("text", [b'{"a": "\\ud800"}', b'{"a": "\\udc00x"}'])
def test_half_a_character_is_refused(text):
  with pytest.raises(ValueError, match="it should be"):
    untrusted.parse_object(text, "it")


@pytest.mark.parametrize("name", ["report.json", "metrics.jsonl"])
def test_a_report_reads_no_other_folder(name, secret, tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / name).symlink_to(secret)
  with pytest.raises(ValueError, match="is a link out of this folder"):
    report.rebuild(tmp_path / "run")


def test_a_report_writes_through_no_link(secret, tmp_path):
  folder = tmp_path / "run"
  folder.mkdir()
  for name in ("report.html", f".report.html.{os.getpid()}.part"):
    (folder / name).symlink_to(secret)
  report.write_report(report.Report("t", "c", {}), folder)
  assert secret.read_text() == "{}"
  assert not (folder / "report.html").is_symlink()


@pytest.mark.parametrize("name", run_folder.OURS)
def test_a_run_writes_through_no_link(name, secret, tmp_path):
  out = tmp_path / "run"
  out.mkdir()
  (out / "run.json").touch()
  (out / name).unlink(missing_ok=True)
  (out / name).symlink_to(secret)
  with (
    pytest.raises(ValueError, match=f"{name} is a link"),
    run_folder.claim(out),
  ):
    pass


def test_a_checkpoint_holds_no_link(secret, tmp_path):
  inner = tmp_path / "run" / "checkpoints" / "3" / "params"
  inner.mkdir(parents=True)
  (inner / "d").symlink_to(secret)
  with pytest.raises(ValueError, match="d is a link"):
    checkpoint.load_params(tmp_path / "run" / "checkpoints", jnp.zeros(2))


LINES = {
  "[]": "must hold a JSON object",
  "{}": "must say a step",
  '{"step": 1, "seconds": 1}': "a step, a split and the seconds",
  '{"step": "1", "split": "train", "seconds": 1}': "a step",
  '{"step": -1, "split": "train", "seconds": 1}': "a step",
  '{"step": 1, "split": ["train"], "seconds": 1}': "a split",
  '{"step": 1, "split": "train", "seconds": {}}': "must be a number",
  '{"step": 1, "split": "train", "seconds": 1, "loss": "low"}': "a number",
  '{"step": 1, "split": "train", "seconds": 1, "loss": 1e40}': "a number",
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_metrics_is_refused_by_its_number(line, tmp_path):
  good = '{"step": 1, "split": "train", "seconds": 1, "loss": NaN}\n'
  (tmp_path / "metrics.jsonl").write_text(good + line + "\n")
  with pytest.raises(
    ValueError, match=rf"metrics\.jsonl, line 2.*{LINES[line]}"
  ):
    report.rebuild(tmp_path)


RECORDS = {
  "title": (3, "`title` of the report must not be a int"),
  "points": ({}, "must not be a dict"),
  "environment": ({"a": []}, r"\['a'\] must not be a list"),
  "measured": ("abc", "must not be a str"),
  "samples": ([{"prompt": "\u0100"}], "characters that are no bytes"),
  "curves": ([{"name": "c", "steps": [True]}], "does not say|must not be"),
}


@pytest.mark.parametrize("field", RECORDS)
def test_a_report_of_other_types_is_refused(field, tmp_path):
  value, match = RECORDS[field]
  record = json.loads(report.store.to_json(full())) | {field: value}
  (tmp_path / "report.json").write_text(json.dumps(record))
  with pytest.raises(
    ValueError, match=f"not a report of adaptivejax: .*{match}"
  ):
    report.load_report(tmp_path)


@pytest.mark.parametrize(
  ("kind", "x"),
  [(float, True), (float, 1e31), (int, 1.0), (int, 10**40), (bytes, "\u0100"),
   (tuple[int, int], [1]), (int | str, None), (str, 1), (dict[str, int], [])],
)  # fmt: skip
def test_what_an_annotation_does_not_say_is_refused(kind, x):
  with pytest.raises(ValueError, match="it"):
    typed(kind, x, "it")


def test_the_name_of_a_measure_is_only_text(tmp_path):
  """It was part of a tag once."""
  curve = report.data.BudgetCurve("m", HOSTILE, (64.0, 128.0), (0.5, 1.0))
  page = written(report.Report("t", "c", {}, budgets=(curve,)), tmp_path)
  assert page.open == [] and not {"script", "img"} & set(page.tags)
  assert HOSTILE in page.text


def test_a_report_runs_nothing_of_where_it_is_made(tmp_path):
  """JAX and matplotlib look for modules that are absent; none is from here."""
  line = {"step": 1, "split": "train", "seconds": 1.0, "loss": 2.0}
  (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
  for name in ("libtpu", "jax_cuda12_plugin", "IPython", "flatbuffers"):
    (tmp_path / f"{name}.py").write_text("open('it-ran', 'w')\n")
  code = "import sys; from adaptivejax.cli import main; main(['report', '.'])"
  env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
  made = [sys.executable, "-c", code]
  subprocess.run(made, cwd=tmp_path, env=env, timeout=90, check=True)
  assert (tmp_path / "report.html").exists()
  assert not (tmp_path / "it-ran").exists()
