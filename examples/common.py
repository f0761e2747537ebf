"""What the examples share: an option, models that are trained once, windows."""

import argparse
import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console

from adaptivejax.training import DataConfig, TrainConfig, data, train


def is_quick(doc: str) -> bool:
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=doc.split("\n")[0])
  parser.add_argument("--quick", action="store_true", help="a minute, no sense")
  return parser.parse_args().quick


def folder_of(name: str, quick: bool) -> Path:
  """Where a run, or a report, lies."""
  return Path("runs") / (f"{name}-quick" if quick else name)


def trained(module: ModuleType, quick: bool, console: Console) -> Any:
  """The model of a config, trained or loaded."""
  config: TrainConfig = module.config()
  out = folder_of(config.name, quick)
  if quick:
    name = f"{config.name}-quick"
    config = dataclasses.replace(config, name=name, steps=8, eval_batches=1)
  console.rule(f"training {config.name}")
  result = train(config, out=out, source=Path(str(module.__file__)))
  if result.stopped:
    raise SystemExit(128 + result.stopped)
  return result.model


def windows(docs, config: DataConfig, quick: bool) -> np.ndarray:
  """Windows of documents, i32[W, S]; two, if quick."""
  (cut,) = data.validation_batches(docs, config, 1)
  return np.asarray(cut)[: 2 if quick else None]
