# SPDX-License-Identifier: Apache-2.0
"""A window of steps under the profiler of JAX.

RUN/profile/plugins/profile/DATE/ then holds the trace of process 0: what each
of its devices and threads did, step by step.  Two ways to look at it:

    pip install xprof && xprof --logdir RUN/profile
    drop perfetto_trace.json.gz on https://ui.perfetto.dev
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax

T = TypeVar("T")


class Window(NamedTuple):
  """The steps to look at: `count` of them from `first` on."""

  first: int
  count: int

  @property
  def last(self) -> int:
    """The last of them."""
    return self.first + self.count - 1


def parse(text: str) -> Window:
  """`STEP:COUNT` as a window.

  Raises:
    ValueError: it is none.
  """
  first, _, count = text.partition(":")
  if not (first.isdigit() and count.isdigit() and int(first) and int(count)):
    raise ValueError(
      f"--profile {text!r} must be STEP:COUNT, such as 100:5 for five steps"
      " from step 100 on"
    )
  return Window(int(first), int(count))


class Profiler:
  """Traces the steps of a window into `folder`: a context around the steps.

  It ends the trace of a run that ends inside of the window.
  """

  def __init__(self, folder: Path, window: Window | None):
    self.folder = folder
    self.window = window
    self.tracing = False

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._end()

  def step(self, step: int, update: Callable[..., T], *args) -> T:
    """`update(*args)`, the update of that step."""
    if self.window is not None and step == self.window.first:
      jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
      self.tracing = True
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      made = update(*args)
    if self.window is not None and step == self.window.last:
      jax.block_until_ready(made)  # the devices are behind
      self._end()
    return made

  def _end(self) -> None:
    if self.tracing:
      self.tracing = False
      jax.profiler.stop_trace()


def check(window: Window | None, step: int, steps: int) -> None:
  """Raises ValueError unless a run from `step` on to `steps` has the window."""
  if window is not None and not step < window.first <= window.last <= steps:
    raise ValueError(
      f"--profile {window.first}:{window.count} must lie within the steps that"
      f" are left: the run is at step {step} of {steps}"
    )
