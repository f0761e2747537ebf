# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written in the background, whole or not at all, resumed from.

A checkpoint is three orbax items: `params`, which alone serves inference;
`state`, the optimizer and the step; and `meta`, JSON with the place of the run
beside its arrays, its settings and the shape of each parameter.  The last two
are compared before an array is read, so that a checkpoint of another run is
refused in words.

checkpoints/STEP            all written, on disk and sealed (`manifest`)
checkpoints/STEP.part       being written, or left behind by a crash
checkpoints/STEP.old        being deleted
checkpoints/STEP.damaged    not as it was sealed: out of the way, never deleted

A name is given and taken by a rename, so STEP is whole whenever it is there.
"""

import contextlib
import copy
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from adaptivejax.files import DAMAGED, aside, to_disk
from adaptivejax.training import agreement, manifest
from adaptivejax.training.quiet import no_traces
from adaptivejax.training.step import TrainState
from adaptivejax.untrusted import refuse_links

PART, OLD = ".part", ".old"
TEXT = "text"
"""The setting that stands for what the corpus holds."""
TRIES = 5
"""How often a reader looks again when what it reads is deleted meanwhile."""


class Checkpoints:
  """The checkpoints of one run: a context that ends when all are on disk.

  Opening it clears away what a crash left half done, and puts damaged
  checkpoints aside: `damaged` says of each later one, by path, what is wrong.
  Of several processes all open it, save and restore alike, and the one that
  holds the folder of the run (`run.claim`) does what is not of arrays.

  Args:
    folder: of the checkpoints.
    settings: those that may not change.
    keep: how many of the newest stay.
  """

  def __init__(self, folder: Path, settings: dict[str, Any], *, keep: int):
    self.folder = folder.absolute()
    self.settings = settings
    self.keep = keep
    self.damaged: dict[Path, str] = {}
    self.latest: int | None = None
    agreement.by_writer(self._open)
    ours = np.array(-1 if self.latest is None else self.latest)
    theirs = int(agreement.everyone(ours)[0])
    self.latest = None if theirs < 0 else theirs
    self.orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    self.worker = ThreadPoolExecutor(1, "checkpoint")
    self.pending: Future | None = None
    self.failed = False

  def __enter__(self):
    self.quiet = no_traces()
    self.quiet.__enter__()
    return self

  def __exit__(self, *error):
    try:
      self.wait()
    finally:
      self.worker.shutdown()
      self.orbax.close()
      if not self.failed:
        self.quiet.__exit__(None, None, None)

  def save(self, state: TrainState, place: Any) -> None:
    """Copies `state` and returns; it is written in the background.

    `place` is that of the run beside its arrays, something JSON can hold.

    Raises:
      OSError: this checkpoint, or the one before, could not be written.
    """
    step = int(state.step)
    if step == self.latest:
      return
    meta = {
      "place": copy.deepcopy(place),  # the run goes on while this is written
      "settings": self.settings,
      "shapes": shapes(state.params),
    }
    args = ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      state=ocp.args.StandardSave(_beside_params(state)),
      meta=ocp.args.JsonSave(meta),
    )
    agreement.by_writer(self.wait)  # if it failed, all stop
    self.wait()
    with self._writing(step):
      self.orbax.save(self.folder / f"{step}{PART}", args=args)
    self.pending = self.worker.submit(self._finish, step)
    self.latest = step

  def wait(self) -> None:
    """Returns when all checkpoints are on disk.

    Raises:
      OSError: one could not be written, with what to do.
    """
    pending, self.pending = self.pending, None
    if pending is not None:
      pending.result()

  def restore(self, like: TrainState) -> tuple[TrainState, Any]:
    """The newest checkpoint, in the form of `like`, and its `place`.

    Raises:
      ValueError: other settings, or parameters of another architecture.
    """
    self.wait()
    folder = self.folder / str(self.latest)
    meta = _meta(self.orbax, folder, like.params)
    for name in sorted(meta["settings"]):  # a later one was at its default
      ours, theirs = self.settings.get(name), meta["settings"].get(name)
      if ours != theirs and name == TEXT:
        raise ValueError(
          f"{self.folder.parent} was trained on another text than the corpus"
          " now is: take that text, or give the run another name"
        )
      if ours != theirs:
        raise ValueError(
          f"{self.folder.parent} was trained with {name}={theirs!r}, not"
          f" {ours!r}: set it back, or give the run another name"
        )
    args = ocp.args.Composite(
      params=ocp.args.StandardRestore(like.params),
      state=ocp.args.StandardRestore(_beside_params(like)),
    )
    found = _restored(self.orbax, folder, args)
    return TrainState(params=found["params"], **found["state"]), meta["place"]

  def _open(self) -> None:
    """Clears away, puts aside, and finds the newest."""
    refuse_links(self.folder)
    self.folder.mkdir(parents=True, exist_ok=True)
    _clear(self.folder)
    self.latest, faults = newest(self.folder)
    why = {}
    for step, fault in faults.items():
      why[aside(self.folder / str(step))] = f": {fault}"
    for step, path in _damaged(self.folder):
      if self.latest is None or step > self.latest:
        self.damaged[path] = (
          f"the checkpoint of step {step} is damaged{why.get(path, '')}; kept"
          f" as {path}"
        )

  def _finish(self, step: int) -> None:
    """In the background: seals a checkpoint, names it, deletes old ones."""
    part = self.folder / f"{step}{PART}"
    with self._writing(step):
      self.orbax.wait_until_finished()
      if not agreement.is_writer():
        return
      manifest.seal(part)
      part.rename(self.folder / str(step))
      to_disk(self.folder)
    for old in steps(self.folder)[: -self.keep]:
      (self.folder / str(old)).rename(self.folder / f"{old}{OLD}")
      shutil.rmtree(self.folder / f"{old}{OLD}")

  @contextlib.contextmanager
  def _writing(self, step: int) -> Iterator[None]:
    """Whatever fails inside is said in words, and takes no room."""
    try:
      yield
    except Exception as error:
      self.failed = True
      if agreement.is_writer():
        _clear(self.folder, ignore_errors=True)  # other writes may still run
      raise OSError(
        f"the checkpoint of step {step} could not be written to {self.folder}"
        f" ({_reason(error)}): make room; the same command goes on from the"
        " newest one that is there"
      ) from None


def _reason(error: Exception) -> str:
  """What the system said, or the beginning of what orbax did."""
  text = str(error).strip() or type(error).__name__
  code = re.search(r"os_error_code='(\d+)'", text)
  return os.strerror(int(code[1])) if code else text.splitlines()[0][:200]


def steps(folder: Path) -> list[int]:
  """The steps that have a checkpoint, in order."""
  if not folder.is_dir():
    return []
  names = [path.name for path in folder.iterdir()]
  return sorted(int(name) for name in names if _is_step(name))


def newest(folder: Path) -> tuple[int | None, dict[int, str]]:
  """The newest checkpoint that is as it was sealed, None without any.

  Returns:
    `(step, faults)`: what is wrong with each later one.
  """
  faults = {}
  for step in reversed(steps(folder)):
    fault = manifest.fault(folder / str(step))
    if fault is None:
      return step, faults
    faults[step] = fault
  return None, faults


def load_params(folder: Path, like: PyTree) -> PyTree:
  """The parameters of the newest checkpoint in `folder`, in the form of `like`.

  Nothing is written, and the run may be going on.

  Raises:
    ValueError: there is no checkpoint, the newest is damaged, or it is of
      another architecture.
  """
  refuse_links(folder)
  orbax = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
  args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
  for found in _looks(folder):
    try:
      _meta(orbax, found, like)
      params = _restored(orbax, found, args)["params"]
    except Exception:
      if found.is_dir():
        raise
    else:
      if found.is_dir():  # still: so nothing of it was deleted meanwhile
        return params
  raise ValueError(
    f"{folder} changes faster than it can be read: the run deletes checkpoints;"
    " give it a larger `keep`, or wait for it"
  )


def _looks(folder: Path) -> Iterator[Path]:
  """The newest checkpoint, and again for a reader from whom it was taken."""
  for _ in range(TRIES):
    found = steps(folder)
    if not found:
      raise ValueError(
        f"{folder.parent} has no checkpoints: train the run first"
      )
    newest = folder.absolute() / str(found[-1])
    fault = manifest.fault(newest) if newest.is_dir() else None
    if fault and newest.is_dir():
      raise ValueError(
        f"the newest checkpoint, {newest}, is damaged: {fault}. Train the run"
        " again, which goes on from the newest one that is whole"
      )
    yield newest


def shapes(params: PyTree) -> dict[str, str]:
  """The shape and type of each parameter by its path, as `f32[4,8]`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): str(
      jax.typeof(leaf)
    )
    for path, leaf in leaves
  }


def _beside_params(state: TrainState) -> dict[str, PyTree]:
  return {"step": state.step, "optimizer": state.optimizer}


def _restored(orbax, folder: Path, args: Any) -> Any:
  """What orbax reads, or a ValueError of one line: it raises all kinds."""
  try:
    return orbax.restore(folder, args=args)
  except Exception as error:
    raise ValueError(
      f"the checkpoint in {folder} cannot be read ({_reason(error)}): put a"
      " copy that can in its place, or move it away"
    ) from error


def _meta(orbax, folder: Path, params: PyTree) -> dict[str, Any]:
  """The JSON of a checkpoint, once its parameters fit `params`."""
  args = ocp.args.Composite(meta=ocp.args.JsonRestore())
  meta = _restored(orbax, folder, args)["meta"]
  plain = isinstance(meta, dict) and "place" in meta
  if not plain or not all(
    isinstance(meta.get(name), dict) for name in ("settings", "shapes")
  ):
    raise ValueError(
      f"the checkpoint in {folder} is not one of adaptivejax: its meta lacks"
      " place, settings or shapes; take the file of another copy"
    )
  ours, theirs = shapes(params), meta["shapes"]
  for name in sorted(ours | theirs):
    if ours.get(name) != theirs.get(name):
      raise ValueError(
        f"the checkpoint in {folder} is of another architecture: parameter"
        f" {name} is {theirs.get(name, 'absent')} there and"
        f" {ours.get(name, 'absent')} in this model"
      )
  return meta


def _is_step(name: str) -> bool:
  return name.isascii() and name.isdigit() and str(int(name)) == name


def _clear(folder: Path, *, ignore_errors: bool = False) -> None:
  """Deletes what was not finished, and what was to be deleted."""
  for path in folder.iterdir():
    step = path.name.partition(".")[0]
    if _is_step(step) and path.name.startswith((step + PART, step + OLD)):
      shutil.rmtree(path, ignore_errors)


def _damaged(folder: Path) -> list[tuple[int, Path]]:
  """Damaged checkpoints that are out of the way, by step."""
  parts = [(path.name.partition(DAMAGED), path) for path in folder.iterdir()]
  return sorted(
    (int(step), path)
    for (step, damaged, _), path in parts
    if damaged and _is_step(step)
  )
