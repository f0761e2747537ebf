# SPDX-License-Identifier: Apache-2.0
"""The matrix: one `Case` per method and adaptive primitive.

A case says how to make the parameters, the inputs, and a call under a budget;
`test_laws.py` holds it to every promise of the library.  A law that cannot
apply is named in `unless`, with the reason in words.

Axes: B batch, T tokens, D features, F hidden, M learners, L layers,
V vocabulary.
"""

import contextlib
import dataclasses
import functools
import sys
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

from adaptivejax.core import Streak, buckets, depth, levels, plans
from adaptivejax.core.cost import Cost, flops
from adaptivejax.core.trigrams import TrigramTable
from adaptivejax.decode import generate
from adaptivejax.methods.decode import ADED, EntropyAdaptive, SelfSpeculation
from adaptivejax.methods.depth import (
  AdaptiveComputationTime,
  DuoMlp,
  MixtureOfDepths,
  MixtureOfRecursions,
  calm,
  deer_vla,
  dynamic_perceiver,
  ffn_skip,
  jei_dnn,
  layer_dropout,
  pabee,
  ponder_net,
  prefix,
  sorted_loss,
  stop_and_exit,
  unified_skip,
)
from adaptivejax.methods.width import AdaptiveComputationModule, split_mlp
from adaptivejax.models import (
  Classifier,
  ClassifierConfig,
  DecoderConfig,
  DecoderLM,
  decoder_block,
)
from adaptivejax.nn import (
  MARGIN,
  STATE,
  Group,
  Mlp,
  Router,
  Setting,
  adjust,
  by_plan,
  every_layer,
  plain,
)
from adaptivejax.nn.linear import linear
from tests import reference

T, D, F, M, L, V = 8, 16, 32, 4, 4, 13
PROMPT = 5
NEVER = 1.1  # above every probability and cosine
CONFIG = DecoderConfig(
  vocab=V, layers=L, features=D, hidden=F, heads=2, kv_heads=1, tied=False
)
ALL, SOME, NO = np.float32(-1e6), np.float32(0.8), np.float32(1e6)  # a tax


LAWS = (
  "full",  # the whole budget equals the dense layer
  "none",  # no budget is the identity, or the least the method can do
  "oracle",  # any budget equals the masked-dense definition
  "gradient",  # so do the gradients
  "cover",  # however the rows are cut into chunks
  "row",  # whichever rows share the batch
  "poison",  # NaN in what is not selected goes nowhere
  "poison_gradient",  # nor into gradients
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
    same_shape: budgets that share a trace, if not the three above.
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
  same_shape: tuple[Any, ...] = ()
  unless: Mapping[str, str] = field(default_factory=dict)

  @property
  def traced(self):
    return self.same_shape or (self.some, self.full, self.none)

  def data(self, budget):
    """The budget as arrays, where it is data."""
    return budget if self.static else jax.tree.map(jnp.asarray, budget)

  def run(self, params, x, budget):
    """The call under a budget."""
    budget = self.data(budget)
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
  params = jax.tree.unflatten(tree, shaken)
  has_budget = isinstance(params, nnx.Module) and nnx.state(params, Setting)
  return adjust(params, 0.0) if has_budget else params


def _asked_always(due, halt):
  """The twin of `only_after`."""

  def rule(l, before, after, memory):
    stop, seen = halt(l, before, after, memory)
    keep = lambda new, old: jnp.where(due(l), new, old)
    return stop & due(l), jax.tree.map(keep, seen, memory)

  return rule


EXECUTORS = {
  "bucketed": (buckets.bucketed, buckets.masked),
  "depth_loop": (depth.depth_loop, depth.depth_scan),
  "only_after": (depth.only_after, _asked_always),
  "run_if": (plans.run_if, plans.run_anyway),
}


@contextlib.contextmanager
def dense_twin():
  """Every executor replaced by its masked-dense twin, wherever it is used."""
  with contextlib.ExitStack() as stack:
    for name, module in list(sys.modules.items()):
      for attribute, (executor, twin) in EXECUTORS.items():
        uses = getattr(module, attribute, None) is executor
        if name.startswith("adaptivejax.") and uses:
          stack.enter_context(mock.patch.object(module, attribute, twin))
    yield


@functools.cache
def compiled(case: Case):
  """The call, compiled; one for all laws."""
  return jax.jit(case.run, static_argnums=2 if case.static else None)


def loss(case: Case, params, x, budget, ignore=False):
  """`(loss, y)`: the loss tells outputs apart, but for those to `ignore`."""
  y = jnp.where(ignore, 0, case.run(params, x, budget)[0])
  return jnp.sin(y).sum(), y


def differentiate(f, params, x):
  """`(y, gradients)` by the parameters and the floating-point inputs."""
  leaves, tree = jax.tree.flatten((params, x))
  moving = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]

  def g(floats):
    rest = iter(floats)
    filled = [next(rest) if m else a for m, a in zip(moving, leaves)]
    return f(*jax.tree.unflatten(tree, filled))

  floats = [a for m, a in zip(moving, leaves) if m]
  grads, y = jax.grad(g, has_aux=True)(floats)
  return y, grads


def gradient(case: Case, params, x, budget, ignore=False):
  """`(y, gradients of the loss)`."""
  f = lambda params, x: loss(case, params, x, budget, ignore)
  return differentiate(f, params, x)


def close(got, want, *, tolerance=1e-5, scale=None):
  """Equal within `tolerance` of the largest value."""
  got, want = jax.tree.leaves(got), jax.tree.leaves(want)
  scales = want if scale is None else [scale] * len(want)
  for g, w, s in zip(got, want, scales, strict=True):
    assert g.shape == w.shape
    size = float(np.abs(np.asarray(s)).max(initial=1e-3))
    np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * size)


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
    return (
      params,
      {**x, "rows": jnp.where(out, jnp.nan, x["rows"])},
      budget,
      out,
    )

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
    reference.mlp(jax.tree.map(lambda a, i=i: a[i], learners), x["rows"])
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


_no_module = "a primitive is a function; its parameters are the caller's"
_no_price = "depth_loop prices nothing; the layers do, see calm"
_no_reverse = "a while_loop has no reverse mode; depth_scan is its twin"
_no_rows = "no rows are compacted"
_no_price_plan = "a plan prices nothing; the layers do, see evopress"
_no_reverse_plan = "a loop of dynamic length; specialize to train"

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
      "poison_gradient": _no_reverse,
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
      "gradient": "depth_loop has no gradient to match",
      "poison_gradient": "a row that never halts is computed, NaN or not",
      "linen": _no_module,
      "cost": _no_price,
      "cover": _no_rows,
    },
  ),
  Case(
    "run_plan",
    "core.plans",
    _layers,
    lambda batch: _normal(batch, D),
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
      "cover": _no_rows,
    },
  ),
  Case(
    "run_if",
    "core.plans",
    _layers,
    lambda batch: _normal(batch, D),
    _run_if,
    full=np.ones(L, bool),
    some=np.arange(L) < 2,
    none=np.zeros(L, bool),
    dense=_deep(L),
    least=lambda params, x: x,
    poison=_poisoned_weights(np.arange(L) < 2, 2, 3),
    unless={"linen": _no_module, "cost": _no_price_plan, "cover": _no_rows},
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


def _routing(module, x):
  """FLOPs of asking every router about every item."""
  kernels = [
    part.kernel.size
    for _, router in nnx.iter_modules(module)
    if isinstance(router, Router)
    for part in (router.inner, router.outer)
    if part is not None
  ]
  return 2.0 * sum(kernels) * x.shape[0] * x.shape[1]


def _certain(module, tax):
  """The gate of training, whose noise loses against such a bias."""
  module = jax.tree.map(lambda a: a, module)  # a copy
  bias = module.gate.outer.bias
  bias.set_value(bias.get_value() - tax * jnp.arange(M + 1.0))
  return module


def _mixture_call(module, x, budget, key=None):
  del budget
  y, _, cost, _ = module(x, _positions(x), key=key)
  return y, cost


def _poisoned_mixture(params, x):
  out = ~adjust(params, float(SOME)).decide(x)[..., None]
  return params, jnp.where(out, jnp.nan, x), SOME, out


def _train_mixture(module, x, capacity):
  module = jax.tree.map(lambda a: a, module)
  module.capacity = capacity
  return _mixture_call(module, x, None, jax.random.key(0))


def _poisoned_top_k(params, x):
  score = reference.score(params.router, x)[..., 0]
  out = jnp.argsort(jnp.argsort(-score)) >= T // 2
  out = out[..., None]
  return params, jnp.where(out, jnp.nan, x), 0.5, out


def _modules(rngs):
  return AdaptiveComputationModule(split_mlp(_mlp(rngs), M), D, rngs=rngs)


def _modules_call(module, x, budget, key=None):
  del budget
  y, cost, _ = module(x, key=key)
  return y, cost


def _recursive(routing, sharing=False):
  def build(rngs):
    block = decoder_block(CONFIG, rngs)
    return MixtureOfRecursions(
      block, D, routing=routing, sharing=sharing, rngs=rngs
    )

  return build


def _once(module, x):
  """The first recursion, which takes all tokens."""
  none = np.zeros(x.shape[:2], bool)
  return reference.recursions(module, x, [~none, none, none])


def _duo(rngs):
  return DuoMlp(Mlp(D, F // 4, rngs=rngs), _mlp(rngs), D, rngs=rngs)


def _duo_overhead(module, x):
  """The router, and the small layer beside the rounding up of both."""
  rows = lambda m, x: m.small.rows(x)
  return _routing(module, x) + flops(rows, module, x)


def _certain_duo(module, tax):
  module = jax.tree.map(lambda a: a, module)  # a copy
  bias = module.router.outer.bias
  bias.set_value(bias.get_value() - tax * jnp.arange(3.0))
  return module


def _poisoned_duo(params, x):
  out = adjust(params, 3.0).choose(x)[..., None] == 0
  return params, jnp.where(out, jnp.nan, x), np.float32(3), out


def _poisoned_modules(params, x):
  out = adjust(params, float(SOME)).level(x)[..., None] == 0
  return params, jnp.where(out, jnp.nan, x), SOME, out


_all_start = "every token runs the first recursion"
_both_run = "training computes both sizes for all tokens"


def _recurrent(rngs):
  block = decoder_block(CONFIG, rngs)
  return AdaptiveComputationTime(block, D, steps=3, rngs=rngs)


def _repeated(count):
  """The block `count` times over; the last state is the output."""

  def run(module, x):
    for time in module.times.get_value()[:count]:
      x = reference.block(module.block, x + time)
    return x

  return run


def _poisoned_steps(params, x):
  params = jax.tree.map(lambda a: a, params)  # a copy
  times = params.times.get_value()
  params.times.set_value(times.at[1:].set(jnp.nan))
  return params, x, NO, None


_no_halting = "the exits are a while_loop; training goes by every exit"
_static_capacity = "the top-k of training has a static size"
_no_zero = "a capacity of 0 is refused: leave the block out"
_all_selected = "training computes all learners for all tokens"
_noise = "training draws one noise for the whole batch"

LAYERS = [
  Case(
    "mixture_of_depths",
    "depth.mixture_of_depths",
    _mixture(0.5),
    _sequence,
    _mixture_call,
    full=ALL,
    some=SOME,
    none=NO,
    place=adjust,
    dense=reference.layer,
    least=lambda m, x: x,
    poison=_poisoned_mixture,
    overhead=_routing,
  ),
  Case(
    "mixture_of_depths.training",
    "depth.mixture_of_depths",
    _mixture(0.5),
    _sequence,
    _train_mixture,
    full=1.0,
    some=0.5,
    none=0.25,
    dense=reference.layer,
    least=lambda m, x: x,
    poison=_poisoned_top_k,
    overhead=_routing,
    static=_static_capacity,
    unless={
      "none": _no_zero,
      "oracle": "top-k against NumPy is in test_mixture_of_depths",
      "gradient": "against finite differences, in the same place",
      "cover": _no_rows,
      "trace": _static_capacity,
      "linen": "the capacity is static: see mixture_of_depths",
    },
  ),
  Case(
    "adaptive_computation_time",
    "depth.adaptive_computation_time",
    _recurrent,
    _sequence,
    _mixture_call,
    full=ALL,
    some=SOME,
    none=NO,
    place=adjust,
    dense=_repeated(3),
    least=_repeated(1),
    poison=_poisoned_steps,
    overhead=lambda m, x: 3 * _routing(m, x),
    unless={"gradient": _no_halting, "poison_gradient": _no_halting},
  ),
  Case(
    "adaptive_computation_time.training",
    "depth.adaptive_computation_time",
    _recurrent,
    _sequence,
    lambda m, x, b: _mixture_call(m, x, b, jax.random.key(0)),
    full=ALL,
    some=SOME,
    none=NO,
    place=adjust,
    dense=_repeated(3),
    least=_repeated(1),
    poison=_poisoned_steps,
    overhead=lambda m, x: 3 * _routing(m, x),
  ),
  Case(
    "adaptive_computation_modules",
    "width.adaptive_computation_modules",
    _modules,
    _sequence,
    _modules_call,
    full=ALL,
    some=SOME,
    none=NO,
    place=adjust,
    dense=reference.mlp,
    least=lambda m, x: jnp.zeros_like(x),
    poison=_poisoned_modules,
    overhead=_routing,
  ),
  Case(
    "adaptive_computation_modules.training",
    "width.adaptive_computation_modules",
    _modules,
    _sequence,
    lambda m, x, b: _modules_call(m, x, b, jax.random.key(0)),
    full=ALL,
    some=SOME,
    none=NO,
    place=_certain,
    dense=reference.mlp,
    least=lambda m, x: jnp.zeros_like(x),
    overhead=_routing,
    unless={
      "oracle": "it is masked-dense itself",
      "gradient": "it is masked-dense itself",
      "cover": _no_rows,
      "poison": _all_selected,
      "poison_gradient": _all_selected,
      "row": _noise,
      "shard_map": _noise,
      "cost": _all_selected,
    },
  ),
  *(
    Case(
      name,
      "depth.mixture_of_recursions",
      _recursive(routing, sharing),
      _sequence,
      _mixture_call,
      full=ALL,
      some=np.float32(0.3),
      none=NO,
      place=adjust,
      dense=reference.recursions,
      least=_once,
      overhead=lambda m, x: m.recursions * _routing(m, x),
      unless={"poison": _all_start, "poison_gradient": _all_start},
    )
    for name, routing, sharing in (
      ("mixture_of_recursions.expert", "expert", False),
      ("mixture_of_recursions.token", "token", False),
      ("mixture_of_recursions.sharing", "expert", True),
    )
  ),
  Case(
    "duo_llm",
    "depth.duo_llm",
    _duo,
    _sequence,
    _modules_call,
    full=ALL,
    some=np.float32(3),
    none=NO,
    place=adjust,
    dense=lambda m, x: reference.mlp(m.big, x),
    least=lambda m, x: jnp.zeros_like(x),
    poison=_poisoned_duo,
    overhead=_duo_overhead,
  ),
  Case(
    "duo_llm.training",
    "depth.duo_llm",
    _duo,
    _sequence,
    lambda m, x, b: _modules_call(m, x, b, jax.random.key(0)),
    full=ALL,
    some=np.float32(3),
    none=NO,
    place=_certain_duo,
    dense=lambda m, x: reference.mlp(m.big, x),
    least=lambda m, x: jnp.zeros_like(x),
    overhead=_duo_overhead,
    unless={
      "oracle": "it is masked-dense itself",
      "gradient": "it is masked-dense itself",
      "cover": _no_rows,
      "poison": _both_run,
      "poison_gradient": _both_run,
      "row": _noise,
      "shard_map": _noise,
      "cost": _both_run,
    },
  ),
]


# --- models -------------------------------------------------------------------


def _tokens(batch):
  draw = np.random.default_rng(0).integers(0, V, (batch, T))
  return jnp.asarray(draw, jnp.int32)


def _model(layer=None):
  return lambda rngs: DecoderLM(CONFIG, layer=layer, rngs=rngs)


def _adaptive_block(rngs):
  return decoder_block(CONFIG, rngs, _modules(rngs))


def _alternating(rngs):
  mixture = MixtureOfDepths(_adaptive_block(rngs), D, capacity=0.5, rngs=rngs)
  return Group([_adaptive_block(rngs), mixture])


def _decode(model, tokens, stack=plain, *, prefill=plain):
  """Logits of the tokens after the prompt, read one by one."""
  cache = model.empty_cache(*tokens.shape)
  cache = model(tokens[:, :PROMPT], cache, stack=prefill).cache

  def step(cache, token):
    out = model(token[:, None], cache, stack=stack)
    return out.cache, (out.logits[:, 0], out.cost)

  _, (logits, cost) = lax.scan(step, cache, tokens[:, PROMPT:].T)
  return jnp.swapaxes(logits, 0, 1), cost.total()


def _calm(model, tokens, threshold, measure=MARGIN):
  stack = Partial(calm, threshold=threshold, measure=measure)
  return _decode(model, tokens, stack)


def _prefix(model, tokens, depth):
  stack = Partial(prefix, depth=depth)
  return _decode(model, tokens, stack, prefill=stack)


def _controlled(rngs):
  return {"model": _model()(rngs), "controller": linear(D, 3, rngs=rngs)}


def _stop_and_exit(params, tokens, levels):
  """Reads on where the controller stops: only its exits matter here."""
  controller = jax.tree.map(lambda a: levels[0] * a, params["controller"])
  stack = Partial(
    stop_and_exit, controller=controller, stop=levels[1], exit=levels[2]
  )
  return _decode(params["model"], tokens, stack)


def _of_model(f):
  """`f` of the model among the parameters."""
  return lambda params, *args: f(params["model"], *args)


def _poisoned_controlled(params, tokens):
  levels = _levels_of(0, 0, 0)
  poison = _poisoned_layers(levels, 1, 2, 3)
  model, *rest = poison(params["model"], tokens)
  return {**params, "model": model}, *rest


def _levels_of(sharpness, stop, exit):
  """All choices tie at a sharpness of 0: the first, stop, is the likeliest."""
  return np.array([sharpness, stop, exit], np.float32)


def _unified(model, tokens, kept):
  return _decode(model, tokens, Partial(unified_skip, kept=kept))


def _ffn_skip(model, tokens, threshold):
  skip = Partial(ffn_skip, threshold=threshold, cold_first=0, cold_last=0)
  return _decode(model, tokens, skip, prefill=skip)


def _by_plan(model, tokens, plan):
  out = model(tokens, stack=Partial(by_plan, plan=plan))
  return out.logits[:, PROMPT:], out.cost


def _by_plan_decoding(model, tokens, plan):
  stack = Partial(by_plan, plan=plan)
  return _decode(model, tokens, stack, prefill=stack)


def _dropout(model, tokens, rates):
  stack = Partial(layer_dropout, rates=rates)
  out = model(tokens, stack=stack, key=jax.random.key(0))
  return out.logits[:, PROMPT:], out.cost


def _plain(model, tokens, budget):
  del budget
  return _decode(model, tokens)


def _dense(model, tokens):
  return reference.decoder(model, tokens)[:, PROMPT:]


def _masks(tokens, rule):
  """rule(l, t) as an array [L, B, T]."""
  table = np.array([[rule(l, t) for t in range(T)] for l in range(L)])
  return np.broadcast_to(table[:, None], (L, len(tokens), T))


def _lived(rule, level=None):
  """The dense model, layer l computing token t by rule(l, t)."""

  def run(model, tokens):
    masks = (None if r is None else _masks(tokens, r) for r in (rule, level))
    live, levels = masks
    return reference.decoder(model, tokens, live, level=levels)[:, PROMPT:]

  return run


def _poisoned_layers(budget, *layers, names=("attention", "mlp")):
  """NaN in the weights of layers that `budget` leaves out."""
  gone = np.isin(np.arange(L), layers)

  def spoil(a):
    return jnp.where(gone.reshape(-1, *[1] * (a.ndim - 1)), jnp.nan, a)

  def poison(model, x):
    model = jax.tree.map(lambda a: a, model)  # a copy
    for name in names:
      part = getattr(model.layers, name)
      setattr(model.layers, name, jax.tree.map(spoil, part))
    return model, x, budget, None

  return poison


def _deciding(model, tokens):
  """FLOPs of all routers, and a readout after every layer."""
  decoded = tokens[:, PROMPT:]
  return _routing(model, decoded) + 2.0 * D * V * L * decoded.size


def _kept(*layers):
  return np.array(layers, np.int32)


def _halves(text):
  """bool[L, 2] from "11 10 ...": attention and feed-forward by layer."""
  return np.array([[c == "1" for c in layer] for layer in text.split()])


def _sorted(model, x, exits):
  """One row at a time, to have rows at all: the loss is a mean."""

  def one(tokens):
    out = model(tokens[None, :-1], stack=every_layer)
    return sorted_loss(out.hidden, model.readout, tokens[None, 1:], exits=exits)

  return lax.map(one, x), Cost.zero()


def _prefix_loss(*exits):
  def run(model, tokens):
    states = reference.hidden(model, tokens[:, :-1])
    losses = []
    for n in exits:
      logits = reference.readout(model, states[n - 1])
      nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
        logits, tokens[:, 1:, None], -1
      ).squeeze(-1)
      losses.append(nats.mean(1))
    return sum(losses) / len(losses)

  return run


def _poisoned_group(model, tokens):
  """NaN in all feed-forward layers, and in the layers of depth."""
  spoil = lambda tree: jax.tree.map(lambda a: a * jnp.nan, tree)
  model = jax.tree.map(lambda a: a, model)  # a copy
  always, mixture = model.layers.layers
  always.mlp.learners = spoil(always.mlp.learners)
  mixture.block = spoil(mixture.block)
  return model, tokens, NO, None


_cache_in_place = "a loop of one round or none keeps the cache in place"
_no_price_loss = "a loss decides nothing"
_static_exits = "which layers are exits is static"
_static_count = "how many layers are kept is static, which ones is data"
_at_prompt = lambda l, t: t < PROMPT
_at_first = lambda l, t: t < PROMPT or l == 0
_nowhere = lambda l, t: 0

TABLE = TrigramTable.build([np.random.default_rng(2).integers(0, V, 200)])


def _drafted(model, tokens, rate):
  """What it writes; the budget is how fast its table learns."""
  policy = ADED(TABLE, rate=rate, nodes=5, depth=2, window=4, size=4)
  made = generate(model, tokens[:, :PROMPT], steps=T, policy=policy)
  return jax.nn.one_hot(made.tokens, V), made.cost


def _written(model, tokens):
  made = generate(model, tokens[:, :PROMPT], steps=T)
  return jax.nn.one_hot(made.tokens, V)


_no_nan = "tokens and tables hold no NaN"
_discrete = "tokens have no gradient"

MODELS = [
  Case(
    "calm",
    "depth.calm",
    _model(),
    _tokens,
    _calm,
    full=np.float32(NEVER),
    some=np.float32(0.1),
    none=np.float32(0),
    dense=_dense,
    least=_lived(_at_first),
    poison=_poisoned_layers(np.float32(0), 1, 2, 3),
    overhead=_deciding,
    unless={
      "gradient": _no_halting,
      "poison_gradient": _no_halting,
      "cover": _no_rows,
    },
  ),
  Case(
    "calm by state",
    "depth.calm",
    _model(),
    _tokens,
    lambda m, x, b: _calm(m, x, b, STATE),
    full=np.float32(NEVER),
    some=np.float32(0.85),
    none=np.float32(-NEVER),
    dense=_dense,
    least=_lived(lambda l, t: t < PROMPT or l < 2),
    poison=_poisoned_layers(np.float32(-NEVER), 2, 3),
    unless={
      "gradient": _no_halting,
      "poison_gradient": _no_halting,
      "cover": _no_rows,
    },
  ),
  Case(
    "stop_and_exit",
    "depth.stop_and_exit",
    _controlled,
    _tokens,
    _stop_and_exit,
    full=_levels_of(1, 1, 1),
    some=_levels_of(1, 0.5, 0.5),
    none=_levels_of(0, 0, 0),
    dense=_of_model(_dense),
    least=_of_model(_lived(_at_first)),
    poison=_poisoned_controlled,
    overhead=lambda p, x: 2.0 * D * 3 * L * x[:, PROMPT:].size,
    unless={
      "gradient": _no_halting,
      "poison_gradient": _no_halting,
      "cover": _no_rows,
      "linen": "the controller is not a part of the module but beside it",
    },
  ),
  Case(
    "unified_layer_skipping",
    "depth.unified_layer_skipping",
    _model(),
    _tokens,
    _unified,
    full=_kept(0, 1, 2, 3),
    some=_kept(0, 3),
    none=_kept(3),
    same_shape=(_kept(0, 3), _kept(1, 2), _kept(0, 1)),
    dense=_dense,
    least=_lived(lambda l, t: t < PROMPT or l == 3),
    poison=_poisoned_layers(_kept(0, 1), 2, 3),
    unless={
      "cover": _no_rows,
      "poison_gradient": "the prompt runs the skipped layers too",
    },
  ),
  Case(
    "ffn_skip",
    "depth.ffn_skip",
    _model(),
    _tokens,
    _ffn_skip,
    full=np.float32(NEVER),
    some=np.float32(0.8),
    none=np.float32(-NEVER),
    dense=_dense,
    least=_lived(None, lambda l, t: l == 0),
    poison=_poisoned_layers(np.float32(-NEVER), 1, 2, 3, names=("mlp",)),
  ),
  Case(
    "evopress",
    "depth.evopress",
    _model(),
    _tokens,
    _by_plan,
    full=_halves("11 11 11 11"),
    some=_halves("11 10 01 00"),
    none=_halves("00 00 00 00"),
    dense=_dense,
    least=_lived(lambda l, t: False),
    poison=_poisoned_layers(_halves("11 11 00 00"), 2, 3),
    unless={"cover": _no_rows},
  ),
  Case(
    "evopress.decoding",
    "depth.evopress",
    _model(),
    _tokens,
    _by_plan_decoding,
    full=_halves("11 11 11 11"),
    some=_halves("11 10 01 00"),
    none=_halves("00 00 00 00"),
    dense=_dense,
    least=_lived(lambda l, t: False),
    poison=_poisoned_layers(_halves("11 11 00 00"), 2, 3),
    unless={
      "gradient": _cache_in_place,
      "poison_gradient": _cache_in_place,
      "cover": _no_rows,
    },
  ),
  Case(
    "layer_skip",
    "depth.layer_skip",
    _model(),
    _tokens,
    _dropout,
    full=np.zeros(L, np.float32),
    some=np.full(L, 0.5, np.float32),
    none=np.ones(L, np.float32),
    dense=_dense,
    least=_lived(lambda l, t: False),
    poison=_poisoned_layers(np.array([0, 0, 1, 1], np.float32), 2, 3),
    unless={"row": _noise, "shard_map": _noise},
  ),
  Case(
    "sorted_fine_tuning",
    "depth.sorted_fine_tuning",
    _model(),
    _tokens,
    _sorted,
    full=(L,),
    some=(1, 3, 4),
    none=(1,),
    dense=_prefix_loss(L),
    least=_prefix_loss(1),
    static=_static_exits,
    unless={
      "oracle": "it is dense itself",
      "gradient": "against separate losses in test_sorted_fine_tuning",
      "cover": _no_rows,
      "poison": "every layer is read",
      "poison_gradient": "every layer is read",
      "trace": _static_exits,
      "cost": _no_price_loss,
    },
  ),
  Case(
    "sorted_fine_tuning.prefix",
    "depth.sorted_fine_tuning",
    _model(),
    _tokens,
    _prefix,
    full=np.int32(L),
    some=np.int32(2),
    none=np.int32(1),
    dense=_dense,
    least=_lived(lambda l, t: l == 0),
    poison=_poisoned_layers(np.int32(2), 2, 3),
    unless={
      "gradient": _no_halting,
      "poison_gradient": _no_halting,
      "cover": _no_rows,
    },
  ),
  # Compositions: what stacks on one model obeys the same laws.
  Case(
    "calm over adaptive modules",
    "depth.calm",
    _model(_adaptive_block),
    _tokens,
    lambda m, x, b: _calm(m, x, b[1]),
    full=(ALL, np.float32(NEVER)),
    some=(SOME, np.float32(0.1)),
    none=(NO, np.float32(0)),
    place=lambda m, b: adjust(m, b[0]),
    dense=_dense,
    least=_lived(_at_first, _nowhere),
    poison=_poisoned_layers((NO, np.float32(0)), 1, 2, 3),
    overhead=_deciding,
    unless={"gradient": _no_halting, "poison_gradient": _no_halting},
  ),
  Case(
    "ffn_skip over adaptive modules",
    "depth.ffn_skip",
    _model(_adaptive_block),
    _tokens,
    lambda m, x, b: _ffn_skip(m, x, b[1]),
    full=(ALL, np.float32(NEVER)),
    some=(SOME, np.float32(0.8)),
    none=(NO, np.float32(-NEVER)),
    place=lambda m, b: adjust(m, b[0]),
    dense=_dense,
    least=_lived(None, _nowhere),
    poison=_poisoned_layers(
      (SOME, np.float32(-NEVER)), 1, 2, 3, names=("mlp",)
    ),
    overhead=_deciding,
  ),
  Case(
    "mixture of depths of adaptive modules",
    "depth.mixture_of_depths",
    _model(_alternating),
    _tokens,
    _plain,
    full=ALL,
    some=SOME,
    none=NO,
    place=adjust,
    dense=_dense,
    least=_lived(lambda l, t: l % 2 == 0, _nowhere),
    poison=_poisoned_group,
    overhead=_deciding,
  ),
]


# --- exits of a classifier ----------------------------------------------------

ENCODER = ClassifierConfig(
  tokens=T, inputs=M, classes=3, layers=L, features=D, hidden=F, heads=2
)


def _images(batch):
  return _normal(batch, T, M)


def _exit(index):
  return lambda model, x: reference.classifier(model, x)[0][index]


def _asking(model, x):
  """FLOPs of the dearest rule: a `Lambda` after every layer."""
  return 2.0 * L * len(x) * (2 * D * F + F * F + F)


def _exits(name, rule, start=lambda batch: None, **budgets):
  """A case of a rule: `rule(budget)`, `start(batch)` its first memory."""

  def call(model, x, budget):
    out = model(x, rule(budget), start(len(x)))
    return out.logits, out.cost

  return Case(
    name,
    f"depth.{name}",
    lambda rngs: Classifier(ENCODER, rngs=rngs),
    _images,
    call,
    **budgets,
    dense=_exit(-1),
    least=_exit(0),
    poison=_poisoned_layers(budgets["none"], 1, 2, 3),
    overhead=_asking,
    unless={"gradient": _no_halting, "poison_gradient": _no_halting},
  )


def _lambda():
  return ponder_net.Lambda(D, F, rngs=nnx.Rngs(5))


def _settled(batch):
  """The action before the first exit: none at all."""
  return deer_vla.Control(jnp.zeros((batch, 3)), jnp.zeros(batch, jnp.int32))


EXITS = [
  _exits(
    "ponder_net",
    lambda q: Partial(ponder_net.q_exit, head=_lambda(), q=q),
    lambda batch: ponder_net.Pondering.start(batch, D),
    full=np.float32(1),
    some=np.float32(0.7),
    none=np.float32(0),
  ),
  _exits(
    "pabee",
    lambda limit: Partial(pabee.patient_exit, limit=limit),
    Streak.none,
    full=np.int32(L),
    some=np.int32(1),
    none=np.int32(0),
  ),
  _exits(
    "deer_vla",
    lambda eta: Partial(deer_vla.action_exit, thresholds=eta, max_layer=L),
    _settled,
    full=np.full(L, -1, np.float32),
    some=np.full(L, 0.7, np.float32),
    none=np.full(L, 1e9, np.float32),
  ),
  _exits(
    "dynamic_perceiver",
    lambda levels: Partial(dynamic_perceiver.budgeted_exit, thresholds=levels),
    full=np.full(L, NEVER, np.float32),
    some=np.full(L, 0.6, np.float32),
    none=np.full(L, 0, np.float32),
  ),
  _exits(
    "jei_dnn",
    lambda level: Partial(
      jei_dnn.gated_exit, gates=jei_dnn.Gates(L), level=level
    ),
    jnp.ones,
    full=np.float32(NEVER),
    some=np.float32(0.7),
    none=np.float32(0),
  ),
]

# --- policies: the text that is generated -------------------------------------

STEPS = 4
ALWAYS, AT_TIMES, NEVER_LARGE = map(np.float32, (-np.inf, 2.1, np.inf))


def _prompt(batch):
  return _tokens(batch)[:, :3]


def _text(model, prompt, policy):
  """The tokens of `STEPS` steps as numbers, and their cost."""
  out = generate(model, prompt, steps=STEPS, policy=policy)
  return out.tokens.astype(jnp.float32), out.cost


def _greedy(model, prompt):
  """The likeliest tokens, one by one, each read with all those before."""
  read = jax.jit(reference.decoder)
  batch, start = prompt.shape
  text = jnp.zeros((batch, start + STEPS), jnp.int32).at[:, :start].set(prompt)
  for t in range(start, start + STEPS):
    text = text.at[:, t].set(read(model, text)[:, t - 1].argmax(-1))
  return text[:, start:].astype(jnp.float32)


def _speculation(model, prompt, budget):
  return _text(model, prompt, SelfSpeculation(*budget))


TRIGRAMS = TrigramTable.build([np.arange(V), np.tile([1, 5, 2], 3)])


def _table_draft(model, prompt, rate):
  return _text(model, prompt, ADED(TRIGRAMS, rate, nodes=6, depth=2))


def _two_models(rngs):
  small = dataclasses.replace(CONFIG, layers=1)
  return {"small": DecoderLM(small, rngs=rngs), "model": _model()(rngs)}


def _two_voices(params, prompt, threshold):
  policy = EntropyAdaptive(params["model"], threshold, dwell=1)
  return _text(params["small"], prompt, policy)


def _poisoned_large(params, prompt):
  spoil = lambda a: a * jnp.nan
  large = jax.tree.map(spoil, params["model"])
  return {**params, "model": large}, prompt, NEVER_LARGE, None


_choice = "a choice of tokens has no gradient"
_asks = "drawing a token asks whether to be greedy; see the law of full budgets"
_beside = "a policy takes its model as a pytree, which the twin is not"
_POLICY = {
  "oracle": _asks,
  "gradient": _choice,
  "poison_gradient": _choice,
  "cover": _no_rows,
  "linen": _beside,
}

POLICIES = [
  Case(
    "self_speculation",
    "decode.self_speculation",
    _model(),
    _prompt,
    _speculation,
    full=(3, 3),
    some=(2, 2),
    none=(1, 1),
    dense=_greedy,
    least=_greedy,
    static="how many layers draft how many tokens is static",
    unless={
      **_POLICY,
      "poison": "all layers verify every draft",
      "cost": "longer drafts need a longer cache, which is priced, too",
      "trace": "how many layers draft how many tokens is static",
    },
  ),
  Case(
    "aded",
    "decode.aded",
    _model(),
    _prompt,
    _table_draft,
    full=np.float32(1),
    some=np.float32(0.04),
    none=np.float32(0),
    dense=_greedy,
    least=_greedy,
    unless={
      **_POLICY,
      "poison": "a draft leaves out nothing that is in the model",
      "cost": "the rate changes the number of steps, not what one costs",
    },
  ),
  Case(
    "entropy_adaptive",
    "decode.entropy_adaptive",
    _two_models,
    _prompt,
    _two_voices,
    full=ALWAYS,
    some=AT_TIMES,
    none=NEVER_LARGE,
    dense=_of_model(_greedy),
    least=lambda params, x: _greedy(params["small"], x),
    poison=_poisoned_large,
    unless={
      **_POLICY,
      "cost": "asked late, the large model reads the prompt then, too",
    },
  ),
]

CASES = [*PRIMITIVES, *LAYERS, *MODELS, *EXITS, *POLICIES]
