# SPDX-License-Identifier: Apache-2.0
"""Prefill once, then step by step.

A policy says how the next tokens are made (`nn.policy`); a bare stack bound to
its thresholds with `jax.tree_util.Partial` is one, too.  It is an argument of
the compiled function, so trying another threshold does not compile again.  Rows
end where they please: the rest goes on without them (`staged_while`).

Axes: B batch, P prompt tokens, T tokens.
"""

import enum
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import Cost, bound_of, flops, times
from adaptivejax.core.sampling import Draw, Sampling
from adaptivejax.core.staged import staged_while
from adaptivejax.decode.inputs import bound, checked, known, row_numbers
from adaptivejax.nn.stack import FULL


class Ended(enum.IntEnum):
  """Why a row ended."""

  LENGTH = 0
  """It has the tokens that were asked for."""
  STOP = 1
  """By its stop token, or by its policy."""
  FULL = 2
  """The cache had no room for another step."""


RUNNING = -1


class Generation(NamedTuple):
  """What was generated.

  Attributes:
    tokens: i32[B, T], the prompt not included; 0 after a row's end.
    count: tokens of each row, its stop token included, i32[B].
    ended: why each row ended, an `Ended`, i32[B].
    depth: layers run one after the other to make each token, f32[B, T], of
      every model that spoke; those of a step are shared out over its tokens.
    steps: decoding steps of each row, i32[B]; `(count - 1) / steps` tokens
      each, the first being the prompt's.
    cost: of the decoding steps, without the prompt; `items` are the tokens they
      made, `full` what plain decoding spends on these.
  """

  tokens: Array
  count: Array
  ended: Array
  depth: Array
  steps: Array
  cost: Cost

  @property
  def tokens_per_step(self) -> Array:
    """Mean over all steps, f32[]; above 1 where drafts were accepted."""
    return (self.count - 1).sum() / jnp.maximum(self.steps.sum(), 1)

  @property
  def mean_depth(self) -> Array:
    """Layers per decoded token, f32[]."""
    total = self.depth[:, 1:].sum()  # the first is the prompt's
    return total / jnp.maximum((self.count - 1).sum(), 1)


class _Row(NamedTuple):
  """The state of a row; B leads everywhere."""

  last: Array
  cache: KVCache
  memory: Any
  keys: Array
  limit: Array
  tokens: Array
  count: Array
  ended: Array
  depth: Array
  steps: Array


def generate(
  model,
  prompt: Int[Array, "B P"],
  *,
  steps: int,
  lengths: Array | np.ndarray | Sequence[int] | None = None,
  limits: Array | np.ndarray | Sequence[int] | None = None,
  policy=FULL,
  temperature: Float[Array, ""] | float = 0.0,
  top_k: Int[Array, ""] | int | None = None,
  top_p: Float[Array, ""] | float = 1.0,
  key: Key[Array, "..."] | None = None,
  stop: Int[Array, ""] | int | None = None,
  capacity: int | None = None,
  rungs: tuple[int, ...] | None = None,
) -> Generation:
  """Continues each prompt by up to `steps` tokens.

  Args:
    model: a `DecoderLM`.
    prompt: at least one token per row, padded on the right.
    steps: the most tokens to make of any row (static).
    lengths: real tokens of each prompt; all if not given.
    limits: the most tokens of each row, in 1..steps; `steps` if not given.
    policy: how tokens are made, a `Policy` or a stack; the prompt runs all
      layers.
    temperature: 0 is greedy; else sampling, which needs `key` (dynamic).
    top_k: draw from the k likeliest only (dynamic).
    top_p: draw from the likeliest that hold this mass (dynamic).
    key: for sampling: one, of which row b takes `fold_in(key, b)`, or a key per
      row, whose draws then depend on nothing else.  Give keys per row where the
      rows of a batch are spread over calls or, in `shard_map`, over devices.
    stop: a token that ends its row (dynamic).
    capacity: slots of the cache (static); room for everything if not given.  A
      row without room for another step ends as `Ended.FULL`.
    rungs: numbers of rows to go on with as rows end, falling, the first all B
      (static), see `staged_while`.
  """
  prompt, lengths = checked(prompt, model.config.vocab, lengths)
  policy = bound(policy)
  policy.check(model)
  batch, longest = prompt.shape
  if steps < 1:
    raise ValueError(f"{steps=} must be at least 1 token.")
  limits = row_numbers("limits", limits, batch, steps)
  sampling = Sampling.of(temperature, top_k, top_p)
  if key is None and (not known(temperature) or temperature > 0):
    raise ValueError(f"{temperature=} draws tokens, which needs a `key`.")
  if stop is not None and known(stop) and not 0 <= stop < model.config.vocab:
    raise ValueError(f"{stop=} is no token of 0..{model.config.vocab - 1}.")
  key = jax.random.key(0) if key is None else key
  if key.shape not in ((), (batch,)):
    raise ValueError(
      f"`key` must be one key or one per row, [{batch}]; got {key.shape}."
    )
  least = longest + policy.reach if steps > 1 else longest
  room = least + max(steps - 2, 0)  # the last token is not read
  slots = room if capacity is None else min(capacity, room)
  if slots < least:
    raise ValueError(
      f"{capacity=} has no room for a prompt of {longest} tokens and a step of"
      f" up to {policy.reach}: give {least} or more."
    )
  return _generate(
    model,
    prompt,
    lengths,
    limits,
    policy,
    sampling,
    key,
    jnp.int32(-1 if stop is None else stop),
    steps=steps,
    slots=slots,
    rungs=None if rungs is None else tuple(rungs),
  )


@functools.partial(jax.jit, static_argnames=("steps", "slots", "rungs"))
def _generate(
  model, prompt, lengths, limits, policy, sampling, key, stop, *, steps, slots,
  rungs,
) -> Generation:  # fmt: skip
  batch, _ = prompt.shape
  rows, newest = jnp.arange(batch), lengths - 1
  keys = key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  cache = model.empty_cache(batch, slots)
  first = model(prompt, cache, lengths=lengths, read_at=newest)
  said = first.logits[:, 0]
  memory, said = policy.start(model, prompt, lengths, slots, said)
  token = Draw(sampling, keys).token(said, lengths)
  blank = jnp.zeros((batch, steps), jnp.int32)
  start = _Row(
    token,
    first.cache,
    memory,
    keys,
    limits,
    blank.at[:, 0].set(token),
    jnp.ones(batch, jnp.int32),
    jnp.zeros(batch, jnp.int32),
    blank.astype(jnp.float32).at[:, 0].set(first.depth[rows, newest]),
    jnp.zeros(batch, jnp.int32),
  )
  # per token: the layers read the whole prompt, the readout its last tokens
  read = flops(lambda t: model.readout(model.embed(t)), prompt[0, 0])
  plain = (first.cost.full / batch - read) / prompt.shape[1] + read
  full = lambda cache: cache.full(policy.reach)
  over = _ended(token == stop, start.count >= limits, full(first.cache))
  start = start._replace(ended=over)

  def step(row: _Row, live):
    draw = Draw(sampling, row.keys)
    out = policy.step(model, row.last, row.cache, row.memory, draw, live)
    place = jnp.arange(out.tokens.shape[1])
    count = jnp.minimum(out.count, row.limit - row.count)
    stops = (out.tokens == stop) & (place < count[:, None])
    count = jnp.where(stops.any(1), stops.argmax(1) + 1, count)
    count = jnp.where(live, count, 0)
    at = jnp.where(place < count[:, None], row.count[:, None] + place, steps)
    write = lambda old, new: old.at[jnp.arange(at.shape[0])[:, None], at].set(
      new, mode="drop"
    )
    each = out.depth / jnp.maximum(count, 1)
    newest = jnp.maximum(count - 1, 0)[:, None]
    total = row.count + count
    ended = _ended(stops.any(1) | out.stop, total >= row.limit, full(out.cache))
    new = _Row(
      jnp.take_along_axis(out.tokens, newest, axis=1)[:, 0],
      out.cache,
      out.memory,
      row.keys,
      row.limit,
      write(row.tokens, out.tokens),
      total,
      jnp.where(live, ended, row.ended),
      write(row.depth, jnp.broadcast_to(each[:, None], at.shape)),
      row.steps + live,
    )
    return new, out.cost

  rows, cost = staged_while(
    step,
    start,
    lambda row: row.ended == RUNNING,
    result=lambda row: row._replace(cache=None, memory=None, keys=None),
    rungs=rungs,
  )
  made = (rows.count - 1).sum(dtype=jnp.float32)  # the first is the prompt's
  twin = policy.twin_flops(model, plain, slots) * made
  most = times(bound_of(step, start, start.ended == RUNNING), steps - 1)
  cost = cost._replace(full=twin, items=made, bound=jnp.float32(most))
  return Generation(
    rows.tokens, rows.count, rows.ended, rows.depth, rows.steps, cost
  )


def _ended(stopped, enough, full):
  none = jnp.where(full, Ended.FULL, RUNNING)
  none = jnp.where(enough, Ended.LENGTH, none)
  return jnp.where(stopped, Ended.STOP, none).astype(jnp.int32)
