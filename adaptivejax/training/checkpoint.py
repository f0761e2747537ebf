# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written in the background, whole or not at all, resumed from.

A checkpoint is three orbax items: `params`, which alone serves inference;
`state`, the optimizer and the step; and `meta`, JSON with the place of the data
iterator, the settings of the run and the shape of each parameter.  The last two
are compared before an array is read, so that a checkpoint of another run is
refused in words.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from adaptivejax.training.step import TrainState
from adaptivejax.untrusted import refuse_links


class Checkpoints:
  """The checkpoints of one run: a context that ends when all are on disk.

  `settings` are those that may not change, `keep` how many of the newest stay.
  """

  def __init__(self, folder: Path, settings: dict[str, Any], *, keep: int):
    refuse_links(folder)
    self.folder = folder
    self.settings = settings
    self.manager = ocp.CheckpointManager(
      folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep)
    )

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self.manager.close()  # waits for what is being written

  @property
  def latest(self) -> int | None:
    """The newest step on disk or on its way there, None before the first."""
    return self.manager.latest_step()

  def save(self, state: TrainState, place: Any) -> None:
    """Copies `state` and returns; it is written in the background.

    `place` is that of the data iterator, something JSON can hold.
    """
    step = int(state.step)
    if step == self.latest:
      return
    meta = {
      "place": place,
      "settings": self.settings,
      "shapes": shapes(state.params),
    }
    self.manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        state=ocp.args.StandardSave(_beside_params(state)),
        meta=ocp.args.JsonSave(meta),
      ),
    )

  def restore(self, like: TrainState) -> tuple[TrainState, Any]:
    """The newest checkpoint, in the form of `like`, and the place in the data.

    Raises:
      ValueError: other settings, or parameters of another architecture.
    """
    meta = _meta(self.manager, self.folder, like.params)
    for name in sorted(meta["settings"]):  # a later one was at its default
      ours, theirs = self.settings.get(name), meta["settings"].get(name)
      if ours != theirs:
        raise ValueError(
          f"{self.folder.parent} was trained with {name}={theirs!r}, not"
          f" {ours!r}: set it back, or give the run another name"
        )
    found = self.manager.restore(
      self.latest,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(like.params),
        state=ocp.args.StandardRestore(_beside_params(like)),
      ),
    )
    return TrainState(params=found["params"], **found["state"]), meta["place"]


def _beside_params(state: TrainState) -> dict[str, PyTree]:
  return {"step": state.step, "optimizer": state.optimizer}


def load_params(folder: Path, like: PyTree) -> PyTree:
  """The parameters of the newest checkpoint in `folder`, in the form of `like`.

  Raises:
    ValueError: there is no checkpoint, or it is of another architecture.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder.parent} has no checkpoints: train the run first")
  refuse_links(folder)
  with ocp.CheckpointManager(folder.absolute()) as manager:
    _meta(manager, folder, like)
    args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
    return manager.restore(manager.latest_step(), args=args)["params"]


def shapes(params: PyTree) -> dict[str, str]:
  """The shape and type of each parameter by its path, as `f32[4,8]`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): str(
      jax.typeof(leaf)
    )
    for path, leaf in leaves
  }


def _meta(manager, folder: Path, params: PyTree) -> dict[str, Any]:
  """The JSON of the newest checkpoint, once its parameters fit `params`."""
  step = manager.latest_step()
  if step is None:
    raise ValueError(f"{folder.parent} has no checkpoints: train the run first")
  args = ocp.args.Composite(meta=ocp.args.JsonRestore())
  meta = manager.restore(step, args=args)["meta"]
  ours, theirs = shapes(params), meta["shapes"]
  for name in sorted(ours | theirs):
    if ours.get(name) != theirs.get(name):
      raise ValueError(
        f"the checkpoint in {folder} is of another architecture: parameter"
        f" {name} is {theirs.get(name, 'absent')} there and"
        f" {ours.get(name, 'absent')} in this model"
      )
  return meta
