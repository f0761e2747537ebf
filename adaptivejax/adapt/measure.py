# SPDX-License-Identifier: Apache-2.0
"""What a changed model says of held-out text, and how fast, beside the model.

Four regimes: "decode", token by token after a short prompt; "long decode", the
same after a long one; "prompt" and "long prompt", a text read at once.  Quality
is over all texts (a row does not depend on the others), and of a prompt over
its last tokens, those with the longest past; the clock runs on one text at a
time, in turn with the model as it was, text by text.

Axes: W texts, P prompt tokens, T tokens to judge.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from adaptivejax.core.cost import Cost
from adaptivejax.core.losses import cross_entropy
from adaptivejax.nn.stack import FULL
from adaptivejax.report.clock import interleave, quartiles
from adaptivejax.report.data import Point


@dataclasses.dataclass(frozen=True)
class Trial:
  """A method at one budget.

  Attributes:
    method, setting: in words.
    model: changed or not.
    stack: how its layers run while decoding.
    prime: makes the stack of each prompt, `(model, tokens i32[B, P]) -> stack`,
      where the method has to see it; else None.  Rows lead its arrays.
    regimes: those it is for.
    exact: largest change of a logit at its full budget; None if it has none.
  """

  method: str
  setting: str
  model: Any
  stack: Any = FULL
  prime: Callable[[Any, Array], Any] | None = None
  regimes: tuple[str, ...] = ("decode",)
  exact: float | None = None


JUDGED = 1024
"""Tokens of a prompt that are judged, the last, at most."""


class Reading(NamedTuple):
  """Nats per token of each text, f32[W]; depth, the mean; cost."""

  nats: Array
  depth: Array
  cost: Cost


class Start(NamedTuple):
  """A prompt that was read: what decoding goes on from."""

  cache: Any
  logits: Array
  stack: Any


Starts = dict[tuple[str, str], Start]
"""Prompts of the model as it was, by regime and setting."""


@functools.partial(jax.jit, static_argnames="slots")
def _begin(model, tokens: Int[Array, "W P"], *, slots: int):
  """`(cache, logits)` behind each prompt."""

  def one(row):  # by itself: plain attention to a long prompt is large
    newest = jnp.full(1, len(row) - 1)
    out = model(row[None], model.empty_cache(1, slots), read_at=newest)
    return jax.tree.map(lambda a: a[0], (out.cache, out.logits[:, 0]))

  return lax.map(one, tokens)


@jax.jit
def _go_on(model, start: Start, tokens: Int[Array, "W T"]) -> Reading:
  """Each of `tokens` after its true past, one by one."""

  def step(carry, token):
    cache, logits = carry
    nats = cross_entropy(logits, token)
    out = model(token[:, None], cache, stack=start.stack)
    return (out.cache, out.logits[:, -1]), (nats, out.depth, out.cost)

  carry = start.cache, start.logits
  _, (nats, depth, cost) = lax.scan(step, carry, tokens.T)
  return Reading(nats.mean(0), depth.mean(), cost.total())


@functools.partial(jax.jit, static_argnames="judged")
def _at_once(
  model, stack, tokens: Int[Array, "W T"], *, judged: int
) -> Reading:
  """Prompts, each read at once into a cache; their ends are judged."""
  size = tokens.shape[1]
  ends = jnp.arange(max(size - 1 - judged, 0), size - 1)

  def one(row):
    cache = model.empty_cache(1, size)
    out = model(row[None], cache, stack=stack, read_at=ends[None])
    nats = cross_entropy(out.logits[0], row[ends + 1]).mean()
    return nats, out.depth.mean(), out.cost

  nats, depth, cost = lax.map(one, tokens)
  return Reading(nats, depth.mean(), cost.total())


@jax.jit
def _prefill(model, stack, tokens: Int[Array, "W T"]):
  """What reading a prompt is for: its last logits and the cache; the cost."""
  cache = model.empty_cache(len(tokens), tokens.shape[1])
  newest = jnp.full(len(tokens), tokens.shape[1] - 1)
  out = model(tokens, cache, stack=stack, read_at=newest)
  return out.logits, out.cache, out.cost


def begin(trial: Trial, prompt: Int[Array, "W P"], room: int) -> Start:
  """Reads the prompts, with room for so many tokens more."""
  cache, logits = _begin(trial.model, prompt, slots=prompt.shape[1] + room)
  prime = trial.prime
  stack = trial.stack if prime is None else prime(trial.model, prompt)
  return Start(cache, logits, stack)


def _row(start: Start, trial: Trial, i: int) -> Start:
  """The start of one text; arrays of a stack that was primed are of rows."""
  cut = lambda a: a[i : i + 1] if a.ndim else a
  cache, logits = jax.tree.map(cut, (start.cache, start.logits))
  primed = trial.prime is not None
  stack = jax.tree.map(cut, start.stack) if primed else start.stack
  return Start(cache, logits, stack)


def measure(
  dense: Trial,
  trial: Trial,
  texts: Int[np.ndarray, "W S"],
  *,
  regime: str,
  prompt: int,
  seconds: float,
  bytes_per_token: float,
  twin: Reading | None = None,
  starts: Starts | None = None,
  timed: int = 3,
  most: int = 24,
  judged: int = JUDGED,
) -> tuple[Point, float, Reading]:
  """The point of a trial, the standard error of its rise in nats, its reading.

  Args:
    dense: the model as it was.
    trial: to measure; may be `dense` itself.
    texts: held out.
    regime: see above.
    prompt: tokens that are read first, P.
    seconds: for the clock.
    bytes_per_token: of the text.
    twin: what `dense` reads there, if that is known.
    starts: of `dense`; what is not there yet is read, and kept there.
    timed: texts that the clock runs on, in turn.
    most: tokens of a text that are decoded on the clock.
    judged: last tokens of a prompt that are judged, at most.
  """
  text = jnp.asarray(texts, jnp.int32)
  timed = min(timed, len(text))
  if regime.endswith("prompt"):
    count = text.shape[1]
    one = [text[i : i + 1] for i in range(timed)]
    costs: dict[int, dict[int, Cost]] = {id(dense): {}, id(trial): {}}

    def read(t):
      out = _at_once(t.model, t.stack, text, judged=judged)
      spent = jax.tree.map(lambda *a: sum(a), *costs[id(t)].values())
      return out._replace(cost=spent)  # of what was timed

    def clock(t):
      def once(i):
        out = _prefill(t.model, t.stack, one[i % timed])
        costs[id(t)][i % timed] = out[2]
        return out

      return once

  else:
    first, rest = text[:, :prompt], text[:, prompt:]
    count = min(most, rest.shape[1])
    room = rest.shape[1]
    kept = {} if starts is None else starts
    if (regime, dense.setting) not in kept:
      kept[regime, dense.setting] = begin(dense, first, room)
    begun = {id(dense): kept[regime, dense.setting]}
    if trial is not dense:
      begun[id(trial)] = begin(trial, first, room)
    read = lambda t: _go_on(t.model, begun[id(t)], rest)

    def clock(t):
      alone = [_row(begun[id(t)], t, i) for i in range(timed)]
      tokens = [rest[i : i + 1, :count] for i in range(timed)]
      return lambda i: _go_on(t.model, alone[i % timed], tokens[i % timed])

  base, own = interleave([clock(dense), clock(trial)], seconds=seconds, least=3)
  twin = read(dense) if twin is None else twin
  out = twin if trial is dense else read(trial)
  low, middle, high = quartiles([a / b for a, b in zip(base, own)])
  gap = out.nats - twin.nats
  error = float(jnp.std(gap)) / math.sqrt(max(len(text) - 1, 1))
  nats, same = float(out.nats.mean()), trial is dense
  point = Point(
    method=trial.method,
    setting=trial.setting,
    regime=regime,
    bits_per_byte=nats / math.log(2) / bytes_per_token,
    tokens_per_second=count / quartiles(own)[1],
    speedup=1.0 if same else middle,
    spread=(1.0, 1.0) if same else (low, high),
    flops_share=float(out.cost.share),
    mean_depth=float(out.depth),
    dense=same,
    perplexity=math.exp(nats),
  )
  return point, error, out
