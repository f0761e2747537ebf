# SPDX-License-Identifier: Apache-2.0
"""Law: damage is found, said and kept aside; the run goes on before it."""

import shutil

import pytest

from adaptivejax.training import checkpoint, manifest
from adaptivejax.training.run import read_events, untold


@pytest.fixture
def run(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / "run")


def files(folder):
  return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, at=0.5):
  """Changes a bit in the middle, and nothing else."""
  content = bytearray(path.read_bytes())
  content[int(len(content) * at)] ^= 4
  path.write_bytes(content)


def test_a_bit_in_any_file_is_seen(run):
  newest = run / "checkpoints" / "8"
  assert manifest.fault(newest) is None
  assert len(files(newest)) > 5
  for path in files(newest):
    content = path.read_bytes()
    for at in (0, 0.5, 1 - 1e-9):
      if content:
        flip(path, at)
        assert manifest.fault(newest), path
        assert checkpoint.newest(newest.parent)[0] == 6
        path.write_bytes(content)
  assert manifest.fault(newest) is None


def test_a_file_that_is_cut_or_gone_or_new_is_seen(run):
  newest = run / "checkpoints" / "8"
  for path in files(newest):
    content = path.read_bytes()
    path.unlink()
    assert manifest.fault(newest), path
    if content:
      path.write_bytes(content[:-1])
      assert manifest.fault(newest), path
    path.write_bytes(content)
  (newest / "more").write_text("")
  assert "'more' is in no list" in manifest.fault(newest)


def test_a_link_out_of_the_folder_is_not_followed(run, tmp_path):
  newest = run / "checkpoints" / "8"
  some = max(files(newest), key=lambda path: path.stat().st_size)
  shutil.move(some, tmp_path / "elsewhere")
  some.symlink_to(tmp_path / "elsewhere")
  assert "is not as it was written" in manifest.fault(newest)


@pytest.mark.parametrize("how", ["a flipped bit", "half written", "twice"])
def test_the_run_goes_on_before_the_damage(run, goes_on, how):
  folder = run / "checkpoints"
  largest = max(files(folder / "8"), key=lambda path: path.stat().st_size)
  if how == "half written":
    shutil.copytree(folder / "8", folder / "10.part")
    (folder / "8" / manifest.NAME).unlink()
    shutil.rmtree(folder / "8" / "state")
  else:
    flip(largest)
  before = {path.name: path.read_bytes() for path in files(folder / "8")}
  if how == "twice":
    (folder / "8.damaged").mkdir()
  assert goes_on(run) == 6
  aside = folder / ("8.damaged-2" if how == "twice" else "8.damaged")
  after = {path.name: path.read_bytes() for path in files(aside)}
  assert after == before
  told = [e["text"] for e in read_events(run) if e["event"] == "damaged"]
  assert len(told) == (2 if how == "twice" else 1)
  assert "step 8 is damaged: it" in told[-1] and str(aside) in told[-1]


def test_damage_is_told_if_the_run_died_before_it_said_so(run, goes_on):
  folder = run / "checkpoints"
  (folder / "8").rename(folder / "8.damaged")
  (folder / "2.damaged").mkdir()  # of before
  assert goes_on(run) == 6
  (told,) = [e for e in read_events(run) if e["event"] == "damaged"]
  assert "step 8 is damaged; kept as" in told["text"]
  path = folder.absolute() / "8.damaged"
  assert untold(run, {path: f"kept as {path}"}) == []  # once is enough
  assert untold(run, {path.with_name("8"): "other"}) == ["other"]


def test_without_any_whole_checkpoint_it_starts_again(run, goes_on):
  folder = run / "checkpoints"
  for step in ("6", "8"):
    (folder / step / manifest.NAME).unlink()
  assert goes_on(run) == 0
  assert {p.name for p in folder.glob("*.damaged")} == {
    "6.damaged",
    "8.damaged",
  }


def test_a_reader_of_a_damaged_checkpoint_is_told_and_moves_nothing(run):
  folder = run / "checkpoints"
  flip(max(files(folder / "8"), key=lambda path: path.stat().st_size))
  before = files(run)
  like = {"no": "matter"}
  with pytest.raises(ValueError, match="8, is damaged: its file .* as it was"):
    checkpoint.load_params(folder, like)
  assert files(run) == before


def test_lines_that_are_damaged_are_named(run, goes_on):
  flip(run / "metrics.jsonl", 0)
  with pytest.raises(ValueError, match="metrics.jsonl, line 1 is not the JSON"):
    goes_on(run)
