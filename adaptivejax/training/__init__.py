# SPDX-License-Identifier: Apache-2.0
"""Training: data, optimizer, budget schedules, checkpoints and the loop."""

from adaptivejax.training.config import TrainConfig, load_config
from adaptivejax.training.data import DataConfig, load_corpus
from adaptivejax.training.heads import fit_head
from adaptivejax.training.loop import TrainResult, load_run, train
from adaptivejax.training.optimizer import OptimizerConfig
from adaptivejax.training.step import evaluate

__all__ = [
  "DataConfig",
  "OptimizerConfig",
  "TrainConfig",
  "TrainResult",
  "evaluate",
  "fit_head",
  "load_config",
  "load_corpus",
  "load_run",
  "train",
]
