# SPDX-License-Identifier: Apache-2.0
"""Policies by name, for command lines and reports."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial

from adaptivejax.methods import depth
from adaptivejax.nn import MARGIN, MAX_PROB, STATE
from adaptivejax.nn.stack import FULL, layer_count


def _full(model, setting):
  del model, setting
  return FULL


def _calm(measure):
  def make(model, setting):
    del model
    level = jnp.float32(setting)
    return Partial(depth.calm, threshold=level, measure=measure)

  return make


def _unified(model, setting):
  kept = depth.kept_layers(layer_count(model.layers), setting)
  return Partial(depth.unified_skip, kept=jnp.asarray(kept, jnp.int32))


def _ffn_skip(model, setting):
  del model
  return Partial(depth.ffn_skip, threshold=jnp.float32(setting))


POLICIES: dict[str, tuple[Callable[..., Any], float, str]] = {
  "full": (_full, 0.0, "all layers; the setting is ignored"),
  "calm": (
    _calm(MARGIN),
    0.9,
    "gap between the two likeliest tokens at which a token leaves the layers",
  ),
  "calm_max_prob": (
    _calm(MAX_PROB),
    0.9,
    "probability of the likeliest token at which a token leaves the layers",
  ),
  "calm_state": (
    _calm(STATE),
    0.99,
    "cosine of successive states at which a token leaves the layers",
  ),
  "unified": (_unified, 2.0, "wished speed-up: keep 1 / setting of the layers"),
  "ffn_skip": (_ffn_skip, 0.98, "cosine at which feed-forward layers are left"),
}
"""Name -> (maker, default setting, what the setting means)."""


def make_policy(name: str, model, setting: float | None = None):
  """The policy called `name`, at `setting` or its default."""
  if name not in POLICIES:
    raise ValueError(f"no policy {name!r}; there are {', '.join(POLICIES)}.")
  make, default, _ = POLICIES[name]
  return make(model, default if setting is None else setting)
