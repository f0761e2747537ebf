# SPDX-License-Identifier: Apache-2.0
"""The matrix: one `Case` per method and adaptive primitive.

A case says how to make the parameters, the inputs, and a call under a budget;
`test_laws.py` holds it to every promise of the library.  A law that cannot apply
is named in `unless`, with the reason in words.

Axes: B batch, T tokens, D features, F hidden, M learners, L layers, V vocabulary.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.tree_util import Partial

from adaptivejax.core import buckets, depth, levels
from adaptivejax.core.cache import KVCache
from adaptivejax.core.cost import Cost, flops
from adaptivejax.methods.depth import (
  MixtureOfDepths,
  calm,
  ffn_skip,
  sorted_loss,
  unified_skip,
)
from adaptivejax.methods.width import AdaptiveComputationModule, split_mlp
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Block, Group, Mlp, every_layer, plain
from tests import reference

T, D, F, M, L, V = 8, 16, 32, 4, 4, 13
PROMPT = 5
NEVER = 1.1  # above every probability and cosine
CONFIG = DecoderConfig(
  vocab=V, layers=L, features=D, hidden=F, heads=2, kv_heads=1, tied=False
)
ALL, SOME, NO = np.float32(1e6), np.float32(0), np.float32(-1e6)

LAWS = (
  "full",  # the whole budget equals the dense layer
  "none",  # no budget is the identity, or the least the method can do
  "oracle",  # any budget equals the masked-dense definition
  "gradient",  # so do the gradients
  "cover",  # however the rows are cut into chunks
  "row",  # whichever rows share the batch
  "poison",  # NaN in what is not selected goes nowhere
  "eager",  # with and without jit
  "trace",  # one trace for all budgets
  "vmap",  # vmap equals a loop
  "bf16",  # 16 bits come close
  "sharded",  # on eight devices, the compiler spreading the batch
  "shard_map",  # on eight devices, each with its rows
  "export",  # lowers for tpu and cuda
  "linen",  # as a Linen module
  "pure",  # the module is unchanged by a call
  "cost",  # the returned cost is that of the decision
)


@dataclass(frozen=True)
class Case:
  """What the laws need to know.

  Attributes:
    name: of the test.
    method: dotted name of the module under `methods`, or of the primitive.
    build: makes the parameters, a module or a pytree.
    inputs: B -> arrays with B leading.
    call: `(parameters, inputs, budget) -> (y, cost)`, y with B leading.
    full, some, none: budgets; data unless `static`.
    dense: `(parameters, inputs) -> y` of the whole budget.
    least: the same of no budget.
    poison: plants NaN in what the budget it returns leaves out:
      `(parameters, inputs) -> (parameters, inputs, budget, ignore)`, `ignore`
      marking outputs that are NaN by right (or None).
    place: puts the budget into the parameters, where they hold it.
    overhead: FLOPs of deciding, at most: `(parameters, inputs) -> float`.
    static: why the budget is static, if it is.
    unless: law -> why it does not apply.
  """

  name: str
  method: str
  build: Callable[[nnx.Rngs], Any]
  inputs: Callable[[int], Any]
  call: Callable[[Any, Any, Any], tuple[Any, Any]]
  full: Any
  some: Any
  none: Any
  dense: Callable[[Any, Any], Any]
  least: Callable[[Any, Any], Any]
  poison: Callable[[Any, Any], tuple[Any, Any, Any, Any]] | None = None
  place: Callable[[Any, Any], Any] = lambda params, budget: params
  overhead: Callable[[Any, Any], float] = lambda params, x: 0.0
  static: str = ""
  unless: Mapping[str, str] = field(default_factory=dict)

  def run(self, params, x, budget):
    return self.call(self.place(params, budget), x, budget)

  def __hash__(self):
    return hash(self.name)


@functools.cache
def parameters(case: Case, seed: int = 0):
  """Parameters off their initial values, which hide mistakes (ones, zeros)."""
  params = case.build(nnx.Rngs(seed))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  shaken = [
    a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)
  ]
  return jax.tree.unflatten(tree, shaken)


@contextlib.contextmanager
def dense_twin():
  """Every executor replaced by its masked-dense twin."""
  with contextlib.ExitStack() as stack:
    for module in ("core.levels", "nn.mlp", "nn.attention", "core.buckets"):
      name = f"adaptivejax.{module}.bucketed"
      stack.enter_context(mock.patch(name, buckets.masked))
    for module in ("core.depth", "methods.depth.calm"):
      name = f"adaptivejax.{module}.depth_loop"
      stack.enter_context(mock.patch(name, depth.depth_scan))
    yield


def _normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _items(batch):
  """Rows, and their scores: distinct, known, and exact in bf16."""
  ranks = np.random.default_rng(1).permuted(
    np.tile(np.arange(T), (batch, 1)), axis=1
  )
  score = (ranks.astype(np.float32) + 0.5) / T
  return {"rows": _normal(batch, T, D), "score": jnp.asarray(score)}


def _poisoned_items(selected, budget):
  def poison(params, x):
    out = ~selected(x["score"], budget)[..., None]
    return params, {**x, "rows": jnp.where(out, jnp.nan, x["rows"])}, budget, out

  return poison


# --- primitives ---------------------------------------------------------------


def _bucketed(mlp, x, level):
  f = lambda rows, m: rows + m.rows(rows)
  return buckets.bucketed(f, x["rows"], x["score"] > level, mlp)


def _mlp(rngs):
  return Mlp(D, F, rngs=rngs)


def _levels(learners, x, scale):
  level = jnp.floor(x["score"] * scale).astype(jnp.int32)
  f = lambda rows, m: m.rows(rows)
  return levels.level_apply(f, x["rows"], level, learners)


def _all_learners(learners, x):
  return sum(
    reference.mlp(jax.tree.map(lambda a: a[i], learners), x["rows"])
    for i in range(M)
  )


def _layers(rngs):
  return rngs.normal((L, D, D)) / 2


def _deepen(w, l, x, state, live):
  del l
  return x + jnp.tanh(x @ w), state + live


def _halting(loop):
  def call(params, x, level):
    state = jnp.zeros(x.shape[0], jnp.int32)
    sure = lambda l, before, after: jax.nn.sigmoid(after[:, 0]) >= level
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


_no_module = "a primitive is a function; its parameters are the caller's"
_no_price = "depth_loop prices nothing; the layers do, see calm"
_no_reverse = "a while_loop has no reverse mode; depth_scan is its twin"
_no_rows = "no rows are compacted"

PRIMITIVES = [
  Case(
    "bucketed",
    "core.buckets",
    _mlp,
    _items,
    _bucketed,
    full=np.float32(-1),
    some=np.float32(0.5),
    none=np.float32(2),
    dense=lambda m, x: x["rows"] + reference.mlp(m, x["rows"]),
    least=lambda m, x: x["rows"],
    poison=_poisoned_items(lambda s, b: s > b, np.float32(0.5)),
    unless={"linen": _no_module},
  ),
  Case(
    "level_apply",
    "core.levels",
    lambda rngs: split_mlp(_mlp(rngs), M),
    _items,
    _levels,
    full=np.float32(100),
    some=np.float32(5),
    none=np.float32(0),
    dense=_all_learners,
    least=lambda m, x: jnp.zeros_like(x["rows"]),
    poison=_poisoned_items(lambda s, b: s * b >= 1, np.float32(5)),
    unless={"linen": _no_module},
  ),
  Case(
    "depth_loop",
    "core.depth",
    _layers,
    lambda batch: _normal(batch, D),
    _halting("depth_loop"),
    full=np.float32(NEVER),
    some=np.float32(0.8),
    none=np.float32(0),
    dense=_deep(L),
    least=_deep(1),
    poison=_poisoned_row,
    unless={
      "gradient": _no_reverse,
      "linen": _no_module,
      "cost": _no_price,
      "cover": _no_rows,
    },
  ),
  Case(
    "depth_scan",
    "core.depth",
    _layers,
    lambda batch: _normal(batch, D),
    _halting("depth_scan"),
    full=np.float32(NEVER),
    some=np.float32(0.8),
    none=np.float32(0),
    dense=_deep(L),
    least=_deep(1),
    poison=_poisoned_row,
    unless={
      "oracle": "it is the oracle of depth_loop",
      "gradient": "it is plain masked code; depth_loop has no gradient to match",
      "linen": _no_module,
      "cost": _no_price,
      "cover": _no_rows,
    },
  ),
]


# --- layers -------------------------------------------------------------------


def _sequence(batch):
  return _normal(batch, T, D)


def _positions(x):
  return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def _mixture(capacity):
  def build(rngs):
    block = decoder_block(CONFIG, rngs)
    return MixtureOfDepths(block, D, capacity=capacity, rngs=rngs)

  return build


def _router(module):
  """The parts that decide: (router, direction in which compute grows)."""
  if isinstance(module, MixtureOfDepths):
    return module.predictor, jnp.ones(1)
  return module.gate, jnp.arange(M + 1.0)


def _deciders(module):
  kinds = MixtureOfDepths, AdaptiveComputationModule
  return [m for _, m in nnx.iter_modules(module) if isinstance(m, kinds)]


def _lean(module, bias):
  """The decisions of all layers shifted towards more (or less) compute."""
  module = jax.tree.map(lambda a: a, module)  # a copy
  for each in _deciders(module):
    router, direction = _router(each)
    old = router.outer.bias.get_value()
    shift = (bias * direction).astype(old.dtype)
    router.outer.bias.set_value(old + shift)
  return module


def _routing(module, x):
  """FLOPs of deciding for every item."""
  rows = x if jnp.issubdtype(x.dtype, jnp.floating) else _normal(*x.shape, D)
  return sum(
    flops(lambda r, x: r(x), router, rows)
    for each in _deciders(module)
    for router in [each.router, each.predictor]
    if isinstance(each, MixtureOfDepths)
  )


def _mixture_call(module, x, budget, key=None):
  del budget
  y, _, cost, _ = module(x, _positions(x), key=key)
  return y, cost


def _mixture_dense(module, x):
  score = reference.score(module.router, x)
  return x + score * (reference.block(module.block, x) - x)


def _poisoned_mixture(params, x):
  out = ~params.decide(x)[..., None]
  return params, jnp.where(out, jnp.nan, x), SOME, out


def _train_mixture(module, x, capacity):
  module = jax.tree.map(lambda a: a, module)
  module.capacity = capacity
  return _mixture_call(module, x, None, jax.random.key(0))
