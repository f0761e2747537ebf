# SPDX-License-Identifier: Apache-2.0
"""Law: a full disk is said in words, and once there is room the run goes on."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from adaptivejax.training import manifest, train
from adaptivejax.training.run import Lines
from tests.faults import victim

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def trains(corpus, out):
  return train(victim.config(corpus), out=out, progress=False)


@pytest.mark.parametrize("step", [4, 8])
def test_no_room_for_a_checkpoint(
  corpus, tmp_path, monkeypatch, capfd, goes_on, step
):
  """Found in the background: at the next checkpoint, or at the end."""
  inner = manifest.seal

  def seal(folder):
    if folder.name == f"{step}.part":
      raise FULL
    inner(folder)

  out = tmp_path / "run"
  with monkeypatch.context() as patch:
    patch.setattr(manifest, "seal", seal)
    match = rf"step {step} could not be written.*No space left.*: make room; "
    with pytest.raises(OSError, match=match):
      trains(corpus, out)
  left = sorted(path.name for path in (out / "checkpoints").iterdir())
  assert left == [str(s) for s in (step - 4, step - 2) if s]
  assert "Traceback" not in "".join(capfd.readouterr())
  assert goes_on(out) == step - 2


def test_no_room_for_a_line(corpus, tmp_path, monkeypatch, goes_on):
  inner = Path.open

  def open(path, mode="r", **how):
    if path.name == "metrics.jsonl" and mode == "a" and full:
      with inner(path, mode) as file:
        file.write('{"step": 6, "spl')
      raise FULL
    return inner(path, mode, **how)

  full, add = [], Lines.add

  def add_and_fill(lines, line):
    full.extend([True] * (line["step"] == 6))
    add(lines, line)

  out = tmp_path / "run"
  with monkeypatch.context() as patch:
    patch.setattr(Path, "open", open)
    patch.setattr(Lines, "add", add_and_fill)
    with pytest.raises(
      OSError, match=r"metrics.jsonl cannot .*: make room; the"
    ):
      trains(corpus, out)
  assert goes_on(out) == 4


def test_room_is_not_taken_by_what_was_not_finished(whole, tmp_path, goes_on):
  out = shutil.copytree(whole, tmp_path / "run")
  folder = out / "checkpoints"
  for name in ("10.part", "10.part.orbax-checkpoint-tmp", "2.old"):
    shutil.copytree(folder / "6", folder / name)
  goes_on(out)
