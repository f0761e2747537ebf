# SPDX-License-Identifier: Apache-2.0
"""Quality against measured time and compute: the points of a report.

Every point is timed in turn with the dense twin, in this process, on the same
text, and its quality is that of the very computation that was timed.

Axes: W windows of text, S their length.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from adaptivejax import decode
from adaptivejax.core.budget import solve_depth_threshold, solve_setting
from adaptivejax.core.cost import Cost
from adaptivejax.core.losses import cross_entropy
from adaptivejax.decode import FULL
from adaptivejax.nn import adjust, every_layer, exit_confidence
from adaptivejax.report.clock import interleave, quartiles
from adaptivejax.report.data import Point, Sample, Snippet


class Entry(NamedTuple):
  """A model, and how its layers are run."""

  method: str
  setting: str
  model: Any
  policy: Any = FULL


class Reading(NamedTuple):
  """What reading gave: nats per byte of each window, f32[W], and totals."""

  nats: Array
  depth: Array
  cost: Cost


@jax.jit
def read_by_token(model, policy, windows: Int[Array, "W S"]) -> Reading:
  """Decodes the windows one after the other, each token after its true past."""

  def one(window):
    out = decode.score(model, window[None], policy=policy)
    return Reading(out.nats.mean(), out.depth.mean(), out.cost)

  out = jax.lax.map(one, windows)
  return Reading(out.nats, out.depth.mean(), out.cost.total())


@jax.jit
def read_at_once(model, policy, windows: Int[Array, "W S"]) -> Reading:
  """Scores all windows in one call."""
  out = model(windows[:, :-1], stack=policy)
  nats = cross_entropy(out.logits, windows[:, 1:]).mean(1)
  return Reading(nats, out.depth.mean(), out.cost)


def measure_points(
  dense: Entry,
  entries: Sequence[Entry],
  windows: Int[np.ndarray, "W S"],
  *,
  regime: str,
  seconds: float,
  progress=lambda: None,
) -> tuple[list[Point], list[float]]:
  """Times each entry in turn with the dense twin.

  Args:
    dense: the twin.
    entries: what to compare with it.
    windows: held-out text, bytes.
    regime: "decode" (token by token, batch 1) or "score" (all at once).
    seconds: to spend on each pair.
    progress: called after each point.

  Returns:
    The points, the twin first, and for each the standard error of its bits per
    byte relative to the twin's, over the windows (they are paired).
  """
  read = {"decode": read_by_token, "score": read_at_once}[regime]
  text = jnp.asarray(windows, jnp.int32)
  run = lambda e: read(e.model, e.policy, text)
  points, errors = [], []
  twin = run(dense)
  for entry in [dense, *entries]:
    base, own = interleave(
      [lambda _: run(dense), lambda _, e=entry: run(e)],
      seconds=seconds,
      least=3,
    )
    out = run(entry)
    gap = float(jnp.std(out.nats - twin.nats)) / math.sqrt(len(windows))
    errors.append(gap / float(twin.nats.mean()))
    points.append(_point(entry, entry is dense, regime, text, base, own, out))
    progress()
  return points, errors


def _point(entry, is_dense, regime, text, base, own, out: Reading) -> Point:
  low, middle, high = quartiles([a / b for a, b in zip(base, own)])
  tokens = text.shape[0] * (text.shape[1] - 1)
  exits = entry.policy is not FULL  # else every token runs every layer
  return Point(
    method=entry.method,
    setting=entry.setting,
    regime=regime,
    bits_per_byte=float(out.nats.mean()) / math.log(2),
    tokens_per_second=tokens / quartiles(own)[1],
    speedup=1.0 if is_dense else middle,
    spread=(1.0, 1.0) if is_dense else (low, high),
    flops_share=float(out.cost.share),
    mean_depth=float(out.depth) if exits else None,
    dense=is_dense,
  )


def exit_threshold(
  model, windows: Int[np.ndarray, "W S"], depth: float, min_depth: int = 1
) -> float:
  """The margin at which tokens of `calm` leave after `depth` layers on average.

  Args:
    model: a `DecoderLM`.
    windows: calibration text.
    depth: wished mean.
    min_depth: layers that every token runs.
  """
  out = model(jnp.asarray(windows, jnp.int32), stack=every_layer)
  sure = exit_confidence(out.hidden, model.readout)[:, min_depth - 1 :]
  return solve_depth_threshold(np.asarray(sure), depth - min_depth + 1)


def at_budget(
  model, windows: Int[np.ndarray, "W S"], share: float, span: float
):
  """The model with its settings moved to spend `share` on these windows.

  Args:
    model: one that holds `nn.Setting`s.
    windows: calibration text, not the text it is judged on.
    share: of the dense twin's FLOPs.
    span: largest setting to try, either way.

  Returns:
    `(model, setting)`.
  """
  text = jnp.asarray(windows, jnp.int32)

  def measure(setting: float) -> float:
    out = read_at_once(adjust(model, jnp.float32(setting)), FULL, text)
    return float(out.cost.spent / out.cost.full)

  setting = solve_setting(measure, share, low=-span, high=span)
  return adjust(model, jnp.float32(setting)), setting


def snippet(entry: Entry, text: bytes) -> Snippet:
  """Where the compute went while reading `text`, layer by token."""
  tokens = jnp.asarray([[10, *text]], jnp.int32)  # after a newline
  out = decode.score(entry.model, tokens, policy=entry.policy)
  shares = np.asarray(out.shares)
  return Snippet(
    text=text,
    share=tuple(float(s) for s in shares.mean(1)),
    matrix=tuple(tuple(float(s) for s in row) for row in shares.T),
    method=entry.method,
    setting=entry.setting,
  )


def samples(
  entries: Sequence[Entry], prompt: bytes, steps: int
) -> list[Sample]:
  """Greedy continuations, timed in turn, the prompt included."""
  tokens = jnp.asarray([list(prompt)], jnp.int32)
  writers = [
    functools.partial(
      decode.generate, e.model, tokens, steps=steps, policy=e.policy
    )
    for e in entries
  ]
  times = interleave([lambda _, w=w: w() for w in writers], seconds=0, least=3)
  made = [write() for write in writers]
  return [
    Sample(
      prompt=prompt,
      continuation=bytes(np.asarray(out.tokens[0]).astype(np.uint8)),
      method=entry.method,
      setting=entry.setting,
      tokens_per_second=steps / quartiles(own)[1],
      mean_depth=float(out.depth.mean()),
    )
    for entry, own, out in zip(entries, times, made)
  ]
