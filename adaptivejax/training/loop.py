# SPDX-License-Identifier: Apache-2.0
"""The training loop: resumes by default, stops gracefully, never clobbers.

A run is a function of its config.  Its state after a step is the parameters,
the optimizer's moments, the step, the place of the data iterator, and what was
measured since the last line of the log; noise is folded from the step.  So a
run that was stopped or killed, and resumed, equals one that was not.

Axes: N batches, B batch, S context + 1, the bytes of a window.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Int32, Key

from adaptivejax.training import data, run
from adaptivejax.training.checkpoint import Checkpoints, load_params
from adaptivejax.training.config import FREE, TrainConfig, load_config, settings
from adaptivejax.training.debug import first_bad_operation
from adaptivejax.training.optimizer import make_optimizer
from adaptivejax.training.placement import Placement, start
from adaptivejax.training.progress import Stop, stoppable
from adaptivejax.training.recorder import Recorder
from adaptivejax.training.step import (
  Join,
  TrainState,
  evaluate,
  make_step,
  split,
)


class TrainResult(NamedTuple):
  """A trained model and where its run is."""

  model: nnx.Module
  metrics: dict[str, float]  # the newest, by `split/metric`
  run_dir: Path
  step: int
  stopped: int  # the signal that ended the run before its last step, else 0


def train(
  config: TrainConfig,
  *,
  out: Path,
  progress: bool = True,
  source: Path | None = None,
  debug_nans: bool = False,
) -> TrainResult:
  """Trains, or goes on with the run in `out`; a finished run is only loaded.

  SIGINT and SIGTERM end it after the step they meet, with a checkpoint.

  Args:
    config: the run.
    out: its folder, such as runs/NAME.
    progress: whether to show a bar and the evaluations.
    source: the config file, kept with the run for `adaptivejax generate`.
    debug_nans: stop at the first step that is not finite, and say where it
      comes from; takes more memory.

  Raises:
    ValueError: before a step is compiled: no such corpus, or one too small; a
      folder that is no run, or that another process writes in; a run of other
      settings or another architecture.  Later: too many steps in a row whose
      loss or gradient is not finite.
    OSError: the disk is full; the same command goes on.
  """
  corpus = data.load_corpus(config.data)
  folder, fixed = out / "checkpoints", settings(config)
  with run.claim(out), Checkpoints(folder, fixed, keep=config.keep) as saved:
    parts, state = _prepare(config, corpus)
    begun, place = saved.latest, None
    if begun is not None:
      state, places = saved.restore(state)
      parts.batches.set_state(places["data"])
      place = places["log"]
    run.describe(out, {n: getattr(config, n) for n in FREE} | fixed, source)
    step = int(state.step)
    recorder = Recorder(config, out, step, place, show=progress)
    with parts.placement.ambient(), stoppable() as stop, recorder.display:
      for text in saved.damaged:
        recorder.note(step, "damaged", text)
      if 0 < step < config.steps:
        recorder.note(step, "resumed", "goes on from its checkpoint")
      state = _steps(config, parts, state, saved, recorder, stop, debug_nans)
  step = int(state.step)
  return TrainResult(
    model=parts.join(state.params),
    metrics=recorder.log.latest,
    run_dir=out,
    step=step,
    stopped=stop.number if step < config.steps else 0,
  )


def load_run(run_dir: Path) -> tuple[TrainConfig, nnx.Module]:
  """The config of a run and its model with the newest parameters.

  Raises:
    ValueError: no run of a config file, or its checkpoint does not fit it.
  """
  config = load_config(run_dir / "config.py")
  join, params = split(config.build(nnx.Rngs(config.seed)))
  return config, join(load_params(run_dir / "checkpoints", params))


class _Parts(NamedTuple):
  """What a run is made of, beside its state."""

  join: Join
  placement: Placement
  optimizer: Any
  batches: Any  # grain's iterator over i32[B,S]
  held_out: Int32[np.ndarray, "N B S"]
  noise: Key[Array, ""]


def _prepare(
  config: TrainConfig, corpus: data.Corpus
) -> tuple[_Parts, TrainState]:
  optimizer = make_optimizer(config.optimizer, config.steps)
  placement, join, state = start(config, optimizer)
  parts = _Parts(
    join=join,
    placement=placement,
    optimizer=optimizer,
    batches=data.training_batches(corpus.train, config.data),
    held_out=data.validation_batches(
      corpus.validation, config.data, config.eval_batches
    ),
    noise=nnx.Rngs(config.seed).noise(),
  )
  return parts, state


def _steps(
  config: TrainConfig,
  parts: _Parts,
  state: TrainState,
  saved: Checkpoints,
  recorder: Recorder,
  stop: Stop,
  debug_nans: bool,
) -> TrainState:
  """The steps that are left, or those until a signal."""
  at = parts.placement
  update = make_step(
    config, parts.join, parts.optimizer, at.shardings, donate=not debug_nans
  )
  for step in range(int(state.step) + 1, config.steps + 1):
    batch = at.batch(next(parts.batches))
    before = state
    state, metrics = update(state, batch, parts.noise)
    if debug_nans and metrics["skipped"]:
      found = first_bad_operation(update, before, batch, parts.noise)
      raise ValueError(f"step {step} is not finite: {found}")
    recorder.add(step, metrics)
    last = step == config.steps
    ends = last or stop.number != 0
    if last or step % config.log_every == 0:
      recorder.write_training(step)
    if last or step % config.eval_every == 0:
      model = parts.join(state.params)
      held_out = map(at.batch, parts.held_out)
      recorder.write_validation(step, evaluate(model, held_out))
    if ends or step % config.checkpoint_every == 0:
      recorder.settle(step)
      if last or not recorder.streak:  # else it would hold what makes no sense
        recorder.sync()
        data = parts.batches.get_state()
        saved.save(state, {"data": data, "log": recorder.place})
    if ends:
      break
  return state
