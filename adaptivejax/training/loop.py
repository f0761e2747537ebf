# SPDX-License-Identifier: Apache-2.0
"""The training loop: resumes by default, stops gracefully, never clobbers.

A run is a function of its config.  Its state after a step is the parameters,
the optimizer's moments, the step and the place of the data iterator; noise is
folded from the step.  So a run that was stopped and resumed equals one that was
not.

Axes: B batch, S context + 1, the bytes of a window.
"""

import math
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Key

from adaptivejax.training import agreement, data, profile, run
from adaptivejax.training.checkpoint import Checkpoints, load_params
from adaptivejax.training.config import FREE, TrainConfig, load_config, settings
from adaptivejax.training.optimizer import make_optimizer
from adaptivejax.training.placement import Placement, start
from adaptivejax.training.profile import Profiler, Window
from adaptivejax.training.progress import Display, Stop, stoppable
from adaptivejax.training.step import (
  Join,
  Metrics,
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
  window: Window | None = None,
) -> TrainResult:
  """Trains, or goes on with the run in `out`; a finished run is only loaded.

  SIGINT and SIGTERM end it after the step they meet, with a checkpoint; on many
  hosts, where each calls this alike (`hosts.start`), one step later.

  Args:
    config: the run.
    out: its folder, such as runs/NAME.
    progress: whether to show a bar and the evaluations.
    source: the config file, kept with the run for `adaptivejax generate`.
    window: steps to trace into out/profile.

  Raises:
    ValueError: before a step is compiled: no such corpus, or one too small; a
      folder that is no run; a run of other settings or another architecture; a
      window outside of the steps that are left; hosts that do not agree.
  """
  corpus = data.load_corpus(config.data)
  writer, fixed = agreement.is_writer(), settings(config)
  free = {name: getattr(config, name) for name in FREE}
  agreement.check_same(
    {
      "the text": [zlib.crc32(data.stream(part).data) for part in corpus],
      "the config": (fixed, free, config.mesh, source and source.read_text()),
    }
  )
  agreement.by_writer(lambda: run.claim(out))
  agreement.check_same({f"the content of {out}": run.content(out)})
  parts, state = _prepare(config, corpus)
  with Checkpoints(out / "checkpoints", fixed, keep=config.keep) as checkpoints:
    if checkpoints.latest is not None:
      state, place = checkpoints.restore(state)
      parts.batches.set_state(place)
    profile.check(window, int(state.step), config.steps)
    if writer:
      run.describe(out, free | fixed, source)
    show = progress and writer
    recorder = _Recorder(config, out, int(state.step), show=show, write=writer)
    profiler = Profiler(out / "profile", window if writer else None)
    ambient, display = parts.placement.ambient(), recorder.display
    with ambient, stoppable() as stop, display, profiler:
      state = _steps(
        config, parts, state, checkpoints, recorder, stop, profiler
      )
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
  batches: Any  # grain's iterator over `data.Batch`
  held_out: list[data.Batch]
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
  checkpoints: Checkpoints,
  recorder: "_Recorder",
  stop: Stop,
  profiler: Profiler,
) -> TrainState:
  """The steps that are left, or those until a signal."""
  at = parts.placement
  agreed = agreement.Agreement(at.mesh)
  update = make_step(config, parts.join, parts.optimizer, at.shardings)
  for step in range(int(state.step) + 1, config.steps + 1):
    batch = at.batch(next(parts.batches))
    state, metrics = profiler.step(step, update, state, batch, parts.noise)
    recorder.add(step, metrics)
    last = step == config.steps
    told = agreed(stop.number)
    if told:
      stop.number = told  # it may have come to another host
    ends = last or told != 0
    if ends or step % config.log_every == 0:
      recorder.write_training(step)
    if last or step % config.eval_every == 0:
      model = parts.join(state.params)
      held_out = map(at.batch, parts.held_out)
      recorder.write_validation(step, evaluate(model, held_out))
    if ends or step % config.checkpoint_every == 0:
      checkpoints.save(state, parts.batches.get_state())
    if ends:
      break
  return state


class _Recorder:
  """Times the run, and sends its metrics to the log and the display."""

  def __init__(self, config: TrainConfig, out: Path, step: int, *, show, write):
    self.tokens = config.data.batch * config.data.context
    self.log = run.MetricsLog(out, step, write=write)
    self.display = Display(config.name, step, config.steps, visible=show)
    self.began = time.perf_counter() - self.log.seconds
    self.mark = time.perf_counter()
    self.waiting: list[Metrics] = []

  def add(self, step: int, metrics: Metrics) -> None:
    self.waiting.append(metrics)  # on the device: nothing waits for them yet
    self.display.advance(step)

  def write_training(self, step: int) -> None:
    """Logs the mean since the last line.

    Raises:
      ValueError: the loss is not finite; the checkpoints so far stay.
    """
    found = jax.device_get(self.waiting)
    now = time.perf_counter()
    means = {
      name: float(sum(metrics[name] for metrics in found) / len(found))
      for name in found[0]
    }
    if not math.isfinite(means["loss"]):
      raise ValueError(
        f"the loss is {means['loss']} at step {step}: lower"
        " optimizer.learning_rate or optimizer.clip; older checkpoints are kept"
      )
    means["tokens_per_second"] = self.tokens * len(found) / (now - self.mark)
    self.log.write(step, "train", now - self.began, means)
    self.display.figures(means)
    self.waiting, self.mark = [], now

  def write_validation(self, step: int, metrics: Mapping[str, float]) -> None:
    now = time.perf_counter()
    self.log.write(step, "validation", now - self.began, metrics)
    self.display.line(step, metrics)
    self.mark = now
