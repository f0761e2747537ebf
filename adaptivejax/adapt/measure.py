# SPDX-License-Identifier: Apache-2.0
"""What a changed model says of held-out text, and how fast, beside the model.

Four regimes: "decode", token by token after a short prompt; "long decode", the
same after a long one; "prompt" and "long prompt", a text read at once.  Quality
is over all texts (a row does not depend on the others), and of a prompt over
its last tokens, those with the longest past, as they were read on the clock;
the clock runs on one text at a time, in turn with the model as it was, text by
text.

Axes: W texts, P prompt tokens, T tokens to judge.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Int

from adaptivejax.core.cost import Cost
from adaptivejax.core.losses import cross_entropy
from adaptivejax.nn import adopt_cache
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
    adopts: in decoding, the model as it was reads its prompts
      (`nn.adopt_cache`).
    regimes: those it is for.
    exact: largest change of a logit at its full budget; None if it has none.
  """

  method: str
  setting: str
  model: Any
  stack: Any = FULL
  prime: Callable[[Any, Array], Any] | None = None
  adopts: bool = False
  regimes: tuple[str, ...] = ("decode",)
  exact: float | None = None


JUDGED = 1024
"""Tokens of a prompt that are judged, the last, at most."""


_adopt = jax.jit(adopt_cache)


class Reading(NamedTuple):
  """Nats per token of each text, f32[W]; mean depth; cost, on the clock."""

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


class _Read(NamedTuple):
  """Of a prompt that was read: the last states, f[1, P, D]; depth and cost."""

  states: Array
  depth: Array
  cost: Cost


def _shown(layers, x, positions, cache=None, *, readout, stack, key=None):
  """A stack that says its last states, too."""
  out = stack(layers, x, positions, cache, readout=readout, key=key)
  return out._replace(notes=out.x)


@jax.jit
def _prefill(model, stack, tokens: Int[Array, "1 P"]):
  """`((logits, cache), read)`: what a prompt is read for, and what of it."""
  cache = model.empty_cache(*tokens.shape)
  newest = jnp.full(1, tokens.shape[1] - 1)
  shown = Partial(_shown, stack=stack)
  out = model(tokens, cache, stack=shown, read_at=newest)
  return (out.logits, out.cache), _Read(out.notes, out.depth.mean(), out.cost)


@functools.partial(jax.jit, static_argnames="judged")
def _judge(model, states, tokens: Int[Array, "1 P"], *, judged: int) -> Array:
  """Nats of the last tokens of a prompt, f32[]."""
  size = tokens.shape[1]
  begin = max(size - 1 - judged, 0)
  logits = model.readout(states[:, begin : size - 1])
  return cross_entropy(logits, tokens[:, begin + 1 :]).mean()


def _sum(costs: Iterable[Cost]) -> Cost:
  return functools.reduce(operator.add, costs)


class _Prompts:
  """Reads texts one by one, and keeps what it last read of each.

  Args:
    trial: a stack that is primed is for decoding, and not asked for here.
    texts: to read.
    judged: last tokens that are judged, at most.
  """

  def __init__(self, trial: Trial, texts: Int[Array, "W P"], judged: int):
    self.trial, self.judged = trial, judged
    self.rows = [texts[i : i + 1] for i in range(len(texts))]
    one = _prefill.lower(trial.model, trial.stack, self.rows[0])
    self.run, self.read = one.compile(), {}

  def __call__(self, i: int) -> Any:
    i %= len(self.rows)
    made, self.read[i] = self.run(
      self.trial.model, self.trial.stack, self.rows[i]
    )
    return made

  def reading(self) -> Reading:
    """Of all texts, once each of them was read."""
    parts = [self.read[i] for i in range(len(self.rows))]
    nats = [
      _judge(self.trial.model, part.states, row, judged=self.judged)
      for part, row in zip(parts, self.rows)
    ]
    depth = jnp.stack([part.depth for part in parts]).mean()
    cost = _sum(part.cost for part in parts)
    return Reading(jnp.stack(nats), depth, cost)


class _Texts:
  """Goes on with texts behind prompts, one by one; some tokens at a time."""

  def __init__(
    self, trial: Trial, start: Start, rest: Int[Array, "W T"], most: int
  ):
    some = range(min(len(rest), 3))
    self.trial, self.start, self.rest = trial, start, rest
    self.starts = [_row(start, trial, i) for i in some]
    self.rows = [rest[i : i + 1, :most] for i in some]
    self.cost: dict[int, Cost] = {}

  def __call__(self, i: int) -> Any:
    i %= len(self.rows)
    made = _go_on(self.trial.model, self.starts[i], self.rows[i])
    self.cost[i] = made.cost
    return made

  def reading(self) -> Reading:
    """Of all texts, whole, at the cost of what was read by itself."""
    made = _go_on(self.trial.model, self.start, self.rest)
    return made._replace(cost=_sum(self.cost.values()))


def begin(
  trial: Trial,
  prompt: Int[Array, "W P"],
  room: int,
  dense: Start | None = None,
) -> Start:
  """Reads the prompts, with room for so many tokens more; or adopts `dense`."""
  if trial.adopts and dense is not None:
    cache, logits = _adopt(trial.model, dense.cache), dense.logits
  else:
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
    seconds: for the clock, which runs on three texts or more, and on each
      prompt.
    bytes_per_token: of the text.
    twin: what `dense` reads there, if that is known.
    starts: of `dense`; what is not there yet is read, and kept there.
    most: tokens of a text that are decoded on the clock at a time.
    judged: last tokens of a prompt that are judged, at most.
  """
  text = jnp.asarray(texts, jnp.int32)
  sides = [dense] if trial is dense else [dense, trial]
  if regime.endswith("prompt"):
    count = text.shape[1]
    clocks = [_Prompts(side, text, judged) for side in sides]
  else:
    first, rest = text[:, :prompt], text[:, prompt:]
    count, room = min(most, rest.shape[1]), rest.shape[1]
    kept = {} if starts is None else starts
    key = regime, dense.setting
    kept[key] = kept.get(key) or begin(dense, first, room)
    behind = [kept[key]]
    if trial is not dense:
      behind.append(begin(trial, first, room, kept[key]))
    clocks = [_Texts(*side, rest, most) for side in zip(sides, behind)]
  slow = regime == "long prompt"  # so none is read in vain
  least = max(len(clocks[0].rows), 0 if slow else 3)
  times = interleave(clocks, seconds=seconds, least=least, warm=not slow)
  base, own = times[0], times[-1]
  twin = twin or clocks[0].reading()
  out = clocks[-1].reading()
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
