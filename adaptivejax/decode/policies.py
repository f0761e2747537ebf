# SPDX-License-Identifier: Apache-2.0
"""Policies by name, for command lines and reports.

A function per policy: its first line of documentation says what it does, its
keyword arguments are its settings, their defaults are its defaults.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from adaptivejax.core.trigrams import TrigramTable
from adaptivejax.methods import decode, depth
from adaptivejax.nn import MARGIN, MAX_PROB, STATE
from adaptivejax.nn.stack import FULL, layer_count

MEASURES = {"margin": MARGIN, "max_prob": MAX_PROB, "state": STATE}


def full(model):
  """All layers, one token after the other."""
  del model
  return FULL


def calm(
  model,
  *,
  threshold: float = 0.9,
  measure: str = "margin",
  min_depth: int = 1,
  every: int = 1,
  max_depth: int | None = None,
  decay: float = 0.0,
  horizon: float = 256.0,
):
  """A token leaves the layers once sure, by margin, max_prob or state."""
  if measure not in MEASURES:
    raise ValueError(f"{measure=} must be one of {', '.join(MEASURES)}.")
  total = layer_count(model.layers)
  most = total if max_depth is None else max_depth
  _within("min_depth", min_depth, 1, total)
  _within("max_depth", most, 1, total)
  return Partial(
    depth.calm,
    threshold=jnp.float32(threshold),
    measure=MEASURES[measure],
    min_depth=jnp.int32(min_depth),
    every=jnp.int32(every),
    max_depth=jnp.int32(most),
    decay=jnp.float32(decay),
    horizon=jnp.float32(horizon),
  )


def prefix(model, *, layers: int | None = None):
  """The first layers only, a sub-model of sorted fine-tuning."""
  total = layer_count(model.layers)
  count = (total + 1) // 2 if layers is None else layers
  _within("layers", count, 1, total)
  return Partial(depth.prefix, depth=jnp.int32(count))


def unified(model, *, speedup: float = 2.0):
  """The same 1 / speedup of the layers for every token, evenly spread."""
  kept = depth.kept_layers(layer_count(model.layers), speedup)
  return Partial(depth.unified_skip, kept=jnp.asarray(kept, jnp.int32))


def ffn_skip(model, *, threshold: float = 0.98, budget: float = 1.0):
  """Feed-forward layers are skipped once one moved the token less than this."""
  del model
  return Partial(
    depth.ffn_skip,
    threshold=jnp.float32(threshold),
    budget=jnp.float32(budget),
  )


def stop_and_exit(
  model,
  *,
  controller=None,
  stop: float = 1.0,
  exit: float = 0.9,
  end: int = 0,
  min_depth: int = 1,
  every: int = 1,
):
  """A trained controller lets a token leave the layers, or ends the text."""
  del model
  if controller is None:
    raise ValueError(
      "stop_and_exit asks a controller that is trained on this model's text:"
      " give a corpus to train it on (`training.fit_head`)."
    )
  return depth.StopAndExit(
    controller,
    stop=jnp.float32(stop),
    exit=jnp.float32(exit),
    end=jnp.int32(end),
    min_depth=jnp.int32(min_depth),
    every=jnp.int32(every),
  )


def self_speculation(model, *, exit: int | None = None, draft: int = 3):
  """The first `exit` layers draft, all verify: the text of all layers."""
  third = max(layer_count(model.layers) // 3, 1)
  return decode.SelfSpeculation(third if exit is None else exit, draft)


def aded(model, *, corpus: np.ndarray | None = None, nodes: int = 24):
  """A tri-gram table drafts, all layers verify: the text of all layers."""
  del model
  table = TrigramTable.build([] if corpus is None else [corpus])
  return decode.ADED(table, nodes=nodes)


def entropy_adaptive(
  model, *, large=None, threshold: float = 1.0, dwell: int = 10
):
  """A second, large model speaks where the entropy in nats is high."""
  del model
  if large is None:
    raise ValueError("entropy_adaptive needs a second model: give `large`.")
  level, dwell_ = jnp.float32(threshold), jnp.int32(dwell)
  return decode.EntropyAdaptive(large, level, dwell_)


POLICIES: dict[str, Callable[..., Any]] = {
  make.__name__: make
  for make in (
    full,
    calm,
    prefix,
    unified,
    ffn_skip,
    stop_and_exit,
    self_speculation,
    aded,
    entropy_adaptive,
  )
}
"""Name -> maker, `make(model, **settings)`."""


def settings_of(name: str) -> dict[str, inspect.Parameter]:
  """The settings of a policy, by name."""
  _known("policy", name, POLICIES)
  parameters = inspect.signature(POLICIES[name]).parameters
  return {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def make_policy(name: str, model, **settings):
  """The policy called `name`, its other settings at their defaults."""
  allowed = settings_of(name)
  for setting in settings:
    _known(f"setting of {name}", setting, allowed)
  return POLICIES[name](model, **settings)


def plain_settings(name: str) -> dict[str, type]:
  """The settings that a command line can give, and their types."""
  kinds = {}
  for key, parameter in settings_of(name).items():
    if parameter.default is not None:
      kinds[key] = type(parameter.default)
    elif parameter.annotation == int | None:
      kinds[key] = int
  return kinds


def describe() -> str:
  """A line per policy: its name, what it does, its settings."""
  lines = []
  for name, make in POLICIES.items():
    first = (make.__doc__ or "").split("\n")[0]
    plain = plain_settings(name)
    settings = [_show(p) for k, p in settings_of(name).items() if k in plain]
    lines.append(f"  {name:18}{first}")
    if settings:
      lines.append(f"  {'':18}  {' '.join(settings)}")
  return "\n".join(lines)


def _show(parameter: inspect.Parameter) -> str:
  default = parameter.default
  return parameter.name if default is None else f"{parameter.name}={default}"


def _known(kind: str, name: str, names) -> None:
  if name in names:
    return
  close = difflib.get_close_matches(name, names, n=1)
  hint = f"; did you mean {close[0]}?" if close else f"; {', '.join(names)}."
  raise ValueError(f"no {kind} {name!r}{hint}")


def _within(name: str, value: int, low: int, high: int) -> None:
  if not low <= value <= high:
    raise ValueError(f"{name}={value} must lie in {low}..{high}.")
