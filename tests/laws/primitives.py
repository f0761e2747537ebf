# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of the primitives of `core`."""

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.core import (
  block_lists,
  block_masks,
  buckets,
  depth,
  experts,
  levels,
  plans,
  sparse_attention,
)
from adaptivejax.core.attention import Keys
from adaptivejax.core.dispatch import NOBODY, dispatch
from adaptivejax.nn import Mlp, split_mlp
from tests import reference
from tests.laws.case import (
  NEVER,
  Case,
  D,
  F,
  L,
  M,
  T,
  gaussian,
  poisoned_items,
  some_rows,
)


def _bucketed(mlp, x, level):
  f = lambda rows, m: rows + m.rows(rows)
  return buckets.bucketed(f, x["rows"], x["score"] > level, mlp)


def small_mlp(rngs):
  return Mlp(D, F, rngs=rngs)


def _levels(learners, x, scale):
  level = jnp.floor(x["score"] * scale).astype(jnp.int32)
  f = lambda rows, m: m.rows(rows)
  return levels.level_apply(f, x["rows"], level, learners)


def _all_learners(learners, x):
  weights = jnp.ones((*x["rows"].shape[:-1], M))
  return reference.experts(learners, x["rows"], weights)


def _weights(x):
  """Of every expert; distinct, so that a level selects some."""
  return (x["score"][..., None] + jnp.arange(M) / M) % 1


def _experts(learners, x, level):
  weights, rows = _weights(x), x["rows"].reshape(-1, D)
  chosen = jnp.where(weights > level, jnp.arange(M), NOBODY)
  plan = dispatch(chosen, weights, M)
  y, cost = experts.expert_apply(lambda r, m: m.rows(r), rows, plan, learners)
  return y.reshape(x["rows"].shape), cost


def _all_experts(learners, x):
  return reference.experts(learners, x["rows"], _weights(x))


def _chosen(score, level):
  return (_weights({"score": score}) > level).any(-1)


def _layers(rngs):
  return rngs.normal((L, D, D)) / 2


def _deepen(w, l, x, state, live):
  del l
  return x + jnp.tanh(x @ w), state + live


def _halting(loop):
  def call(params, x, level):
    state = jnp.zeros(x.shape[0], jnp.int32)
    sure = lambda l, x, y, m: (jax.nn.sigmoid(y[:, 0]) >= level, m)
    run = getattr(depth, loop)
    return run(_deepen, params, x, state, sure).x, None

  return call


def _deep(count):
  def run(params, x):
    for w in params[:count]:
      x = x + jnp.tanh(x @ w)
    return x

  return run


def _poisoned_row(params, x):
  first = jnp.arange(len(x))[:, None] == 0
  return params, jnp.where(first, jnp.nan, x), np.float32(0.8), first


TABLE = plans.PlanTable.of([range(L), (0, 2), (0,)], L)


def _run_plan(params, x, plan):
  layer = lambda w, l, x: _deepen(w, l, x, 0, 0)[0]
  return plans.run_plan(layer, params, x, TABLE, plan), None


def _run_if(params, x, keep):
  f = lambda x, w: x + jnp.tanh(x @ w)
  for i in range(L):
    x = plans.run_if(keep[i], f, x, params[i])
  return x, None


def _poisoned_weights(budget, *gone):
  def poison(params, x):
    return params.at[jnp.array(gone)].set(jnp.nan), x, budget, None

  return poison


HEADS, BLOCK = 4, 2


def _attention_inputs(batch):
  """Keys for two groups of heads, and a score of each block of them."""
  blocks = T // BLOCK
  ranks = np.random.default_rng(1).permuted(
    np.tile(np.arange(blocks), (batch, 1)), axis=1
  )
  return {
    "q": gaussian(batch, T, HEADS, D),
    "k": gaussian(batch, HEADS // 2, T, D, seed=1),
    "v": gaussian(batch, HEADS // 2, T, D, seed=2),
    "score": jnp.asarray((ranks + 0.5) / blocks, jnp.float32),
  }


def _positions(x):
  return jnp.broadcast_to(jnp.arange(T), x["q"].shape[:2])


def _attend_blocks(sinks, x, level):
  mask = (x["score"] > level)[:, None, None]
  mask &= block_masks.causal_blocks(T, T, block_q=BLOCK, block_kv=BLOCK)
  whole = jnp.ones_like(mask) & (level < 0)
  lists = block_lists.lists_from_mask(
    mask | whole, block_q=BLOCK, block_kv=BLOCK
  )
  found, cost = sparse_attention.attend_blocks(
    x["q"],
    Keys(x["k"], x["v"], _positions(x)[:, None]),
    lists,
    _positions(x),
    sinks=sinks,
  )
  return found.out, cost


def _attend_all(sinks, x):
  each = lambda a: jnp.repeat(a, 2, axis=1)
  scores = jnp.einsum("bthd,bhsd->bhts", x["q"], each(x["k"])) / D**0.5
  scores = jnp.where(jnp.tri(T, dtype=bool), scores, -jnp.inf)
  sink = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
  weights = jax.nn.softmax(jnp.concatenate([scores, sink], -1))[..., :-1]
  return jnp.einsum("bhts,bhsd->bthd", weights, each(x["v"]))


def _poisoned_keys(params, x):
  budget = np.float32(0.5)
  gone = jnp.repeat(x["score"] <= budget, BLOCK, axis=1)[:, None, :, None]
  bad = {name: jnp.where(gone, jnp.nan, x[name]) for name in "kv"}
  return params, {**x, **bad}, budget, None


_no_module = "a primitive is a function; its parameters are the caller's"
_no_price = "depth_loop prices nothing; the layers do, see calm"
_no_reverse = "a while_loop has no reverse mode; depth_scan is its twin"
no_rows = "no rows are compacted"
_no_price_plan = "a plan prices nothing; the layers do, see evopress"
_no_reverse_plan = "a loop of dynamic length; specialize to train"

PRIMITIVES = [
  Case(
    "attend_blocks",
    "core.sparse_attention",
    lambda rngs: rngs.normal((HEADS,)),
    _attention_inputs,
    _attend_blocks,
    full=np.float32(-1),
    some=np.float32(0.5),
    none=np.float32(2),
    dense=_attend_all,
    least=lambda sinks, x: jnp.zeros_like(x["q"]),
    poison=_poisoned_keys,
    unless={"linen": _no_module, "cover": "its rows are not compacted"},
  ),
  Case(
    "bucketed",
    "core.buckets",
    small_mlp,
    some_rows,
    _bucketed,
    full=np.float32(-1),
    some=np.float32(0.5),
    none=np.float32(2),
    dense=lambda m, x: x["rows"] + reference.mlp(m, x["rows"]),
    least=lambda m, x: x["rows"],
    poison=poisoned_items(lambda s, b: s > b, np.float32(0.5)),
    unless={"linen": _no_module},
  ),
  Case(
    "level_apply",
    "core.levels",
    lambda rngs: split_mlp(small_mlp(rngs), M),
    some_rows,
    _levels,
    full=np.float32(100),
    some=np.float32(5),
    none=np.float32(0),
    dense=_all_learners,
    least=lambda m, x: jnp.zeros_like(x["rows"]),
    poison=poisoned_items(lambda s, b: s * b >= 1, np.float32(5)),
    unless={"linen": _no_module},
  ),
  Case(
    "expert_apply",
    "core.experts",
    lambda rngs: split_mlp(small_mlp(rngs), M),
    some_rows,
    _experts,
    full=np.float32(-1),
    some=np.float32(0.9),
    none=np.float32(2),
    dense=_all_experts,
    least=lambda m, x: jnp.zeros_like(x["rows"]),
    poison=poisoned_items(_chosen, np.float32(0.9)),
    unless={"linen": _no_module},
  ),
  Case(
    "depth_loop",
    "core.depth",
    _layers,
    lambda batch: gaussian(batch, D),
    _halting("depth_loop"),
    full=np.float32(NEVER),
    some=np.float32(0.8),
    none=np.float32(0),
    dense=_deep(L),
    least=_deep(1),
    poison=_poisoned_row,
    unless={
      "gradient": _no_reverse,
      "poison_gradient": _no_reverse,
      "linen": _no_module,
      "cost": _no_price,
      "cover": no_rows,
    },
  ),
  Case(
    "depth_scan",
    "core.depth",
    _layers,
    lambda batch: gaussian(batch, D),
    _halting("depth_scan"),
    full=np.float32(NEVER),
    some=np.float32(0.8),
    none=np.float32(0),
    dense=_deep(L),
    least=_deep(1),
    poison=_poisoned_row,
    unless={
      "oracle": "it is the oracle of depth_loop",
      "gradient": "depth_loop has no gradient to match",
      "poison_gradient": "a row that never halts is computed, NaN or not",
      "linen": _no_module,
      "cost": _no_price,
      "cover": no_rows,
    },
  ),
  Case(
    "run_plan",
    "core.plans",
    _layers,
    lambda batch: gaussian(batch, D),
    _run_plan,
    full=np.int32(0),
    some=np.int32(1),
    none=np.int32(2),
    dense=_deep(L),
    least=_deep(1),
    poison=_poisoned_weights(np.int32(1), 1, 3),
    unless={
      "oracle": "against a loop over the plan in test_plans",
      "gradient": _no_reverse_plan,
      "poison_gradient": _no_reverse_plan,
      "linen": _no_module,
      "cost": _no_price_plan,
      "cover": no_rows,
    },
  ),
  Case(
    "run_if",
    "core.plans",
    _layers,
    lambda batch: gaussian(batch, D),
    _run_if,
    full=np.ones(L, bool),
    some=np.arange(L) < 2,
    none=np.zeros(L, bool),
    dense=_deep(L),
    least=lambda params, x: x,
    poison=_poisoned_weights(np.arange(L) < 2, 2, 3),
    unless={"linen": _no_module, "cost": _no_price_plan, "cover": no_rows},
  ),
]
