# SPDX-License-Identifier: Apache-2.0
"""The settings of a policy: what is typed, and what is learned."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flax import nnx

from adaptivejax import decode, training
from adaptivejax.cli.parsing import suggestion
from adaptivejax.methods.depth import controller_loss
from adaptivejax.nn.linear import linear
from adaptivejax.training.data import windows


def plain(policy: str, items: Iterable[str]) -> dict[str, Any]:
  """`NAME=VALUE` as numbers and words; unknown names are refused."""
  kinds, found = decode.plain_settings(policy), {}
  for item in items:
    name, equals, value = item.partition("=")
    if not equals:
      raise ValueError(f"--set {item!r} must be NAME=VALUE")
    if name not in kinds:
      raise ValueError(
        f"no setting {name!r} of {policy}{suggestion(name, kinds)}"
      )
    try:
      found[name] = kinds[name](value)
    except ValueError:
      words = "a whole number" if kinds[name] is int else "a number"
      raise ValueError(f"--set {name}={value!r} must be {words}") from None
  return found


def learned(
  policy: str,
  settings: dict[str, Any],
  config: training.TrainConfig,
  model: Any,
  say: Callable[[str], Any],
) -> dict[str, Any]:
  """What some policies learn from the text that the run was trained on."""
  wanted = decode.settings_of(policy)
  if "corpus" in wanted:
    say(f"{policy}: counting the training text")
    text = b"\n".join(training.load_corpus(config.data).train.values())
    return {"corpus": np.frombuffer(text, np.uint8).astype(np.int32)}
  if "controller" in wanted:
    say(f"{policy}: training its controller")
    cut = windows(training.load_corpus(config.data).train, 64)
    head = linear(model.config.features, 3, rngs=nnx.Rngs(0))
    every = settings.get("every", 1)  # the exits that it will be asked at
    loss = functools.partial(controller_loss, every=every)
    tokens = np.asarray(cut, np.int32)
    return {"controller": training.fit_head(head, loss, model, tokens)}
  return {}
