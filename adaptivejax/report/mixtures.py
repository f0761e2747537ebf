# SPDX-License-Identifier: Apache-2.0
"""Where the experts of a model ran: measured on text, for a report.

Axes: W windows of text, S their length, L layers, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from adaptivejax.core.losses import cross_entropy
from adaptivejax.report.data import Mixture, Snippet
from adaptivejax.report.frontier import Entry


class _Use(NamedTuple):
  """What a model said of its experts; leaves stacked over its layers."""

  load: tuple[Array, ...]  # f32[L, E]
  choices: tuple[Array, ...]  # f32[L, W, S - 1]
  dropped: Array
  nats: Array  # f32[W, S - 1]


@jax.jit
def _read(model, policy, windows: Int[Array, "W S"]) -> _Use:
  out = model(windows[:, :-1], stack=policy)
  nats = cross_entropy(out.logits, windows[:, 1:])
  return _Use(out.signals.load, out.signals.choices, out.cost.dropped, nats)


def _use(entry: Entry, windows) -> _Use:
  use = _read(entry.model, entry.policy, jnp.asarray(windows, jnp.int32))
  if not use.load:
    raise ValueError(f"{entry.method!r} has no mixture of experts to look into")
  return use


def _by_layer(stacked: tuple[Array, ...]) -> list[np.ndarray]:
  """The mixtures in the order they run: those of a group take turns."""
  return [np.asarray(one) for together in zip(*stacked) for one in together]


def mixture(
  entry: Entry, windows: Int[np.ndarray, "W S"], *, bins: int = 10
) -> Mixture:
  """How the experts were used while reading the windows.

  Args:
    entry: a model with a mixture of experts.
    windows: held-out text, bytes.
    bins: of tokens by difficulty, at most.

  Raises:
    ValueError: the model has no experts.
  """
  use = _use(entry, windows)
  loads = _by_layer(use.load)
  served = float(sum(load.sum() for load in loads))
  each = np.mean(_by_layer(use.choices), axis=0).reshape(-1)
  nats = np.asarray(use.nats).reshape(-1)
  order = np.argsort(nats, kind="stable")
  parts = np.array_split(order, min(bins, len(order)))
  return Mixture(
    method=entry.method,
    setting=entry.setting,
    load=tuple(_floats(load / max(load.sum(), 1)) for load in loads),
    dropped=float(use.dropped) / max(served + float(use.dropped), 1),
    nats=_floats(nats[part].mean() for part in parts),
    experts=_floats(each[part].mean() for part in parts),
  )


def experts_snippet(entry: Entry, text: bytes) -> Snippet:
  """The share of all experts that each byte ran, layer by layer."""
  use = _use(entry, [[10, *text]])  # after a newline
  counts = [load.size for load in _by_layer(use.load)]
  choices = [a[0] for a in _by_layer(use.choices)]
  rows = [chosen / count for chosen, count in zip(choices, counts)]
  return Snippet(
    text=text,
    share=_floats(np.mean(rows, axis=0)),
    matrix=tuple(_floats(row) for row in rows),
    method=entry.method,
    setting=entry.setting,
    whole="all experts",
  )


def _floats(values) -> tuple[float, ...]:
  return tuple(float(value) for value in values)
