# SPDX-License-Identifier: Apache-2.0
"""The training loop: resumes by default, stops gracefully, never clobbers.

A run is a function of its config.  Its state after a step is the parameters,
the optimizer's moments, the step, the place of the data iterator, and what was
measured since the last line of the log; noise is folded from the step.  So a
run that was stopped or killed, and resumed, equals one that was not.

Axes: B batch, S context + 1, the bytes of a window.
"""

import contextlib
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Key

from adaptivejax.training import agreement, data, profile, run
from adaptivejax.training.checkpoint import TEXT, Checkpoints, load_params
from adaptivejax.training.config import FREE, TrainConfig, load_config, settings
from adaptivejax.training.debug import first_bad_operation
from adaptivejax.training.optimizer import make_optimizer
from adaptivejax.training.placement import Placement, start
from adaptivejax.training.profile import Profiler, Window
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
  window: Window | None = None,
  debug_nans: bool = False,
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
    debug_nans: stop at the first step that is not finite, and say where it
      comes from; takes more memory, and one process.

  Raises:
    ValueError: before a step is compiled: no such corpus, or one too small; a
      folder that is no run, or that another process writes in; a run of other
      settings or another architecture; a window outside of the steps that are
      left; hosts that do not agree.  Later: too many steps in a row whose loss
      or gradient is not finite.
    OSError: the disk is full; the same command goes on.
  """
  if debug_nans and jax.process_count() > 1:
    raise ValueError("--debug-nans takes one process: run it on one host")
  corpus = data.load_corpus(config.data)
  text = [zlib.crc32(data.stream(part).data) for part in corpus]
  writer, fixed = agreement.is_writer(), settings(config) | {TEXT: text}
  free = {name: getattr(config, name) for name in FREE}
  agreement.check_same(
    {
      "the text": text,
      "the config": (fixed, free, config.mesh, source and source.read_text()),
    }
  )
  with contextlib.ExitStack() as held:
    enter = held.enter_context
    agreement.by_writer(lambda: enter(run.claim(out)))
    saved = enter(Checkpoints(out / "checkpoints", fixed, keep=config.keep))
    agreement.check_same({f"the content of {out}": run.content(out)})
    parts, state, place = _prepare(config, corpus, saved)
    step = int(state.step)
    profile.check(window, step, config.steps)
    if writer:
      run.describe(out, free | fixed, source)
    damaged = run.untold(out, saved.damaged) if writer else []
    if damaged and saved.latest is None:
      run.put_aside(out)
    show = progress and writer
    recorder = Recorder(config, out, step, place, show=show, write=writer)
    profiler = enter(Profiler(out / "profile", window if writer else None))
    enter(parts.placement.ambient())
    stop = enter(stoppable())
    enter(recorder.display)
    for text in damaged:
      recorder.note(step, "damaged", text)
    if 0 < step < config.steps:
      recorder.note(step, "resumed", "goes on from its checkpoint")
    steps = _Steps(config, parts, saved, recorder, profiler, debug_nans)
    state = steps.run(state, stop)
  step = int(state.step)
  return TrainResult(
    model=parts.join(state.params),
    metrics=recorder.log.latest,
    run_dir=out,
    step=step,
    stopped=stop.number if step < config.steps else 0,
  )


def load_run(config_py: Path) -> tuple[TrainConfig, nnx.Module]:
  """The config of a run and its model with the newest parameters.

  Args:
    config_py: the `config.py` in the folder of the run.  It is code, and is run
      as such: a folder alone is refused, lest a stranger's be.

  Raises:
    ValueError: no run of a config file, or its checkpoint does not fit it.
  """
  if config_py.is_dir():
    raise ValueError(
      f"{config_py} is a folder; its config is code. If you trust it, name it:"
      f" {config_py / 'config.py'}"
    )
  config = load_config(config_py)
  join, params = split(config.build(nnx.Rngs(config.seed)))
  return config, join(load_params(config_py.parent / "checkpoints", params))


class _Parts(NamedTuple):
  """What a run is made of, beside its state."""

  join: Join
  placement: Placement
  optimizer: Any
  batches: Any  # grain's iterator over `data.Batch`
  held_out: list[data.Batch]
  noise: Key[Array, ""]


def _prepare(
  config: TrainConfig, corpus: data.Corpus, saved: Checkpoints
) -> tuple[_Parts, TrainState, Any]:
  """The parts, the first state or that of the newest checkpoint, and then the
  place of the recorder.
  """
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
  if saved.latest is None:
    return parts, state, None
  state, place = saved.restore(state)
  parts.batches.set_state(place["data"])
  return parts, state, place["log"]


class _Steps(NamedTuple):
  """What the steps of a run need, beside their state."""

  config: TrainConfig
  parts: _Parts
  saved: Checkpoints
  recorder: Recorder
  profiler: Profiler
  debug_nans: bool

  def run(self, state: TrainState, stop: Stop) -> TrainState:
    """The steps that are left, or those until a signal."""
    config, parts, at = self.config, self.parts, self.parts.placement
    agreed = agreement.Agreement(at.mesh)
    keep = self.debug_nans
    update = make_step(
      config, parts.join, parts.optimizer, at.shardings, donate=not keep
    )
    for step in range(int(state.step) + 1, config.steps + 1):
      batch, before = at.batch(next(parts.batches)), state
      state, metrics = self.profiler.step(
        step, update, state, batch, parts.noise
      )
      if self.debug_nans and metrics["skipped"]:
        found = first_bad_operation(update, before, batch, parts.noise)
        raise ValueError(f"step {step} is not finite: {found}")
      self.recorder.add(step, metrics)
      told = agreed(stop.number)
      if told:
        stop.number = told  # it may have come to another host
      self._write(step, state, ends=step == config.steps or told != 0)
      if told:
        break
    return state

  def _write(self, step: int, state: TrainState, *, ends: bool) -> None:
    """A line, an evaluation, a checkpoint: what is due after this step."""
    config, parts, recorder = self.config, self.parts, self.recorder
    last = step == config.steps
    if last or step % config.log_every == 0:
      recorder.write_training(step)
    if last or step % config.eval_every == 0:
      model = parts.join(state.params)
      held_out = map(parts.placement.batch, parts.held_out)
      recorder.write_validation(step, evaluate(model, held_out))
    if ends or step % config.checkpoint_every == 0:
      recorder.settle(step)
      if last or not recorder.streak:  # else it would hold what makes no sense
        recorder.sync()
        data = parts.batches.get_state()
        self.saved.save(state, {"data": data, "log": recorder.place})
