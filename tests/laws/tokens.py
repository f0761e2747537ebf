# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of encoders that lose tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from adaptivejax.core import rungs, token_merging
from adaptivejax.core.cost import Cost
from adaptivejax.core.token_merging import (
  Tokens,
  bipartite_match,
  merge_similar,
  restore,
)
from adaptivejax.methods import tokens as methods
from tests.laws.case import Case, gaussian
from tests.methods import fewer_tokens as oracle

N, D, L = oracle.N, oracle.D, oracle.L
shapes = "a number of tokens is a shape, so each budget is a program"
close_calls = "rounding turns which two tokens are most alike"
parameterless = "it is a function, without a module"


def _texts(batch):
  draw = np.random.default_rng(0).integers(0, 39, (batch, N))
  lengths = N - np.arange(batch) % 3
  return {
    "tokens": jnp.asarray(draw, jnp.int32),
    "lengths": jnp.asarray(lengths, jnp.int32),
  }


def _real(x):
  return (jnp.arange(N) < x["lengths"][:, None])[..., None]


def _poisoned(budget):
  """A word that only padding says is NaN."""

  def poison(model, x):
    model = jax.tree.map(lambda a: a, model)  # a copy
    words = model.embedding.words
    words.set_value(words.get_value().at[39].set(jnp.nan))
    tokens = jnp.where(_real(x)[..., 0], x["tokens"], 39)
    return model, {**x, "tokens": tokens}, budget, None

  return poison


def _deciding(model, x):
  """FLOPs of comparing keys, or of the class token's attention, at most."""
  width = model.config.features // model.config.heads
  row = N * N * width / 2 + 2 * N * model.config.features
  return float(L * len(x["tokens"]) * row * 1.2)


def _case(name, method, stack, rule, *, proportional=False, **rest):
  """`stack(budget)`, and the oracle's `rule(budget)`."""

  def call(model, x, budget):
    out = model(x["tokens"], lengths=x["lengths"], stack=stack(budget))
    return jnp.where(_real(x), out.restored, 0), out.cost

  def want(budget):
    how = None if budget is None else rule(budget)
    return lambda model, x: oracle.batch(
      model, x["tokens"], x["lengths"], how, proportional
    )

  return Case(
    name,
    f"tokens.{method}",
    oracle.build,
    _texts,
    call,
    **rest,
    dense=want(None),
    least=want(rest["none"]),
    poison=_poisoned(rest["some"]),
    overhead=_deciding,
  )


def _merge_rows(params, x, threshold):
  """The primitives alone: pairs above a cosine, work on those left, back."""
  live = _real(x)[..., 0]
  tokens = Tokens.start(x["rows"], live)
  match = bipartite_match(tokens.x[..., :4], live)
  tokens = token_merging.settle(tokens, merge_similar(match, threshold, N))

  def f(x, weights):
    spent = 2.0 * x.size * D
    return jnp.tanh(x @ weights), Cost.dense(spent, x.shape[0] * x.shape[1])

  y, cost = rungs.on_rung(
    f, tokens.x, tokens.lengths, params, rungs=(12, 16, 20, N)
  )
  full = jnp.full_like(cost.full, 2.0 * x["rows"].size * D)
  asked = tokens.lengths.sum(dtype=jnp.float32)
  cost = cost._replace(full=full, items=asked, bound=full)
  return restore(tokens, y), cost


def _rows(batch):
  return {"rows": gaussian(batch, N, D), "lengths": _texts(batch)["lengths"]}


def _merged_rows(params, x, threshold):
  """Row by row, in NumPy."""
  out = np.zeros(x["rows"].shape, np.float32)
  for i, n in enumerate(np.asarray(x["lengths"])):
    rows = np.asarray(x["rows"][i, :n], np.float64)
    metric = rows[:, :4] / np.linalg.norm(rows[:, :4], axis=1)[:, None]
    into = np.arange(n)
    for a in range(0, n, 2):
      cosine = metric[1::2] @ metric[a]
      if cosine.max() > threshold:
        into[a] = 2 * cosine.argmax() + 1
    for b in set(into):
      out[i, :n][into == b] = np.tanh(
        rows[into == b].mean(0) @ np.asarray(params)
      )
  return out


def _poisoned_rows(params, x):
  return (
    params,
    {**x, "rows": jnp.where(_real(x), x["rows"], jnp.nan)},
    np.float32(0.5),
    None,
  )


TOKENS = [
  Case(
    "merged_tokens",
    "core.token_merging",
    lambda rngs: 0.3 * jax.random.normal(rngs.params(), (D, D)),
    _rows,
    _merge_rows,
    full=np.float32(1.1),
    some=np.float32(0.8),
    none=np.float32(-2),
    dense=functools.partial(_merged_rows, threshold=1.1),
    least=functools.partial(_merged_rows, threshold=-2),
    poison=_poisoned_rows,
    unless={"bf16": close_calls, "linen": parameterless},
  ),
  _case(
    "token_merging",
    "token_merging",
    lambda merges: functools.partial(methods.token_merging, merges=merges),
    oracle.most_alike,
    proportional=True,
    full=0,
    some=3,
    none=N,
    static=shapes,
    unless={"trace": shapes, "bf16": close_calls},
  ),
  _case(
    "similar_merging",
    "token_merging",
    lambda level: Partial(methods.similar_merging, threshold=level),
    oracle.alike,
    proportional=True,
    full=np.float32(1.1),
    some=np.float32(0.7),
    none=np.float32(-2),
    unless={"bf16": close_calls},
  ),
  _case(
    "token_pruning",
    "token_pruning",
    lambda keep: functools.partial(methods.token_pruning, keep=keep, at=(0, 2)),
    lambda keep: oracle.attended(keep, (0, 2)),
    full=1.0,
    some=0.5,
    none=0.0,
    static=shapes,
    unless={"trace": shapes},
  ),
  _case(
    "adaptive_token_sampling",
    "adaptive_token_sampling",
    lambda samples: Partial(methods.adaptive_token_sampling, samples=samples),
    lambda samples: oracle.hit(int(samples)),
    full=np.float32(np.inf),
    some=np.float32(16),
    none=np.float32(0),
  ),
]
