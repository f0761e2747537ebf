# SPDX-License-Identifier: Apache-2.0
"""What a training run is: one frozen dataclass, returned by a config file.

A config file is Python: `def config() -> TrainConfig`.  The fields below can be
set on the command line (`--steps 500 --data.batch 8`), the callables cannot.
"""

import dataclasses
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from flax import nnx

from adaptivejax.core.per_device import BATCH_AXES
from adaptivejax.training.data import DataConfig
from adaptivejax.training.mesh import MeshConfig
from adaptivejax.training.optimizer import OptimizerConfig
from adaptivejax.training.schedules import Schedule

C = TypeVar("C")
CALLABLES = ("build", "loss", "budget")
FREE = ("name", "steps", "eval_every", "eval_batches", "log_every")
FREE += ("checkpoint_every", "keep", "max_skips")


@dataclass(frozen=True)
class TrainConfig:
  """A training run.  All fields are static; two runs of one config agree."""

  name: str
  """Name of the run; it is kept in runs/NAME."""

  build: Callable[[nnx.Rngs], nnx.Module]
  """Makes the model: `model(tokens i32[B,T], key=key)` returns an output with
  `logits f32[B,T,V]` and a `cost`."""

  loss: Callable[..., Any]
  """`loss(model, batch i32[B,T+1], key) -> (loss f32[], metrics)`, a mean over
  the rows of the batch; takes the target share of compute as a fourth argument
  when the config has a `budget`.  Metrics: `{name: f32[]}`; one called `share`
  is the realised share of compute."""

  budget: Schedule | None = None
  """Target share of compute after so many steps (`training.schedules`)."""

  data: DataConfig = field(default_factory=DataConfig)
  """The text, and how it is cut."""

  optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
  """AdamW with warm-up and cosine decay."""

  mesh: MeshConfig = field(default_factory=MeshConfig)
  """Devices, and where arrays lie on them; a run may go on with another."""

  precision: Literal["float32", "bfloat16"] = "float32"
  """What a step computes in; parameters and their moments stay float32."""

  steps: int = 1000
  """Updates of the parameters."""

  seed: int = 0
  """Seed of the initial parameters and of the noise in training."""

  log_every: int = 10
  """Steps between lines of metrics.jsonl; each line is their mean."""

  eval_every: int = 250
  """Steps between evaluations on held-out text; the last step always is one."""

  eval_batches: int = 8
  """Batches of an evaluation, spread evenly over the held-out text."""

  checkpoint_every: int = 250
  """Steps between checkpoints; the last step always is one."""

  keep: int = 2
  """Checkpoints to keep, the newest.  With 1, nothing is left to go on from
  when its files decay."""

  max_skips: int = 10
  """Steps in a row that may be skipped, since their loss or gradient is not
  finite, before the run stops."""

  def __post_init__(self):
    """Refuses a name that is a way out, and sizes that are not positive."""
    path = Path(self.name)
    if path.is_absolute() or ".." in path.parts or path == Path():
      raise ValueError(f"name={self.name!r} must name a folder inside runs/")
    for name in ("steps", "log_every", "eval_every", "eval_batches"):
      _positive(name, getattr(self, name))
    for name in ("checkpoint_every", "keep"):
      _positive(name, getattr(self, name))
    if self.max_skips < 0:
      raise ValueError(f"max_skips={self.max_skips} must be at least 0")
    accumulate = self.optimizer.accumulate
    if self.data.batch % accumulate:
      raise ValueError(
        f"optimizer.accumulate={accumulate} must divide data.batch="
        f"{self.data.batch}, so that its parts are equal"
      )
    split = math.prod(max(getattr(self.mesh, a), 1) for a in BATCH_AXES)
    if self.data.batch % (split * accumulate):
      raise ValueError(
        f"data.batch={self.data.batch} must be a multiple of {split}, the"
        " devices over which the mesh splits it (data x fsdp x expert), times"
        f" optimizer.accumulate={accumulate}"
      )


def load_config(path: Path) -> TrainConfig:
  """`run_config` of a training run."""
  return run_config(path, TrainConfig)


def run_config(
  path: Path, kind: type[C], name: str = "config", **given: Any
) -> C:
  """Runs a config file and returns what its `config()` returns.

  Args:
    path: the file.
    kind: what is to come back.
    name: of another function of the file.
    given: arguments of the function.

  Raises:
    ValueError: no such file, or it has no function `config` that returns a
      `kind` and takes these arguments, or it fails; the line names the place.
  """
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  if not path.is_file() or spec is None or spec.loader is None:
    raise ValueError(f"{path} is no config file: name a Python file")
  module = importlib.util.module_from_spec(spec)
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())  # a config may import its neighbours
  try:
    spec.loader.exec_module(module)
    make = getattr(module, name)
    missing = {*given} - {*inspect.signature(make).parameters}
    config = make(**given) if not missing else None
  except Exception as error:
    raise ValueError(
      f"{path} fails: {type(error).__name__}: {error}"
    ) from error
  if missing:
    raise ValueError(
      f"{path}: `{name}()` takes no {', '.join(sorted(missing))}: it is the"
      f" same at all, unless it is `def {name}({missing.pop()}=...)`"
    )
  if not isinstance(config, kind):
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    raise ValueError(
      f"{path}: `{name}()` must return {article} {kind.__name__}"
    )
  return config


def says(path: Path, name: str) -> bool:
  """Whether a config file has a function of this name."""
  return bool(re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE))


def settings(config: TrainConfig) -> dict[str, Any]:
  """What must not change when a run goes on, as `{dotted name: value}`.

  Callables are left out (the checkpoint knows the shapes of the parameters),
  and so are the fields in `FREE`, which may change: they leave past steps as
  they were.  The values are plain: JSON holds them.
  """
  flat = {}
  for name, value in vars(config).items():
    if name == "mesh":  # the same run, elsewhere
      continue
    if dataclasses.is_dataclass(value):
      flat |= {f"{name}.{key}": item for key, item in vars(value).items()}
    elif name not in CALLABLES + FREE:
      flat[name] = value
  return flat


def _positive(name: str, value: int) -> None:
  if value < 1:
    raise ValueError(f"{name}={value} must be at least 1")
