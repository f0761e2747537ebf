# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of layers and feed-forward modules."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptivejax.core.cost import flops
from adaptivejax.methods.depth import (
  AdaptiveComputationTime,
  DuoMlp,
  MixtureOfDepths,
  MixtureOfRecursions,
)
from adaptivejax.methods.width import AdaptiveComputationModule
from adaptivejax.models import decoder_block
from adaptivejax.nn import Mlp, Router, adjust, split_mlp
from tests import reference
from tests.laws.case import ALL, CONFIG, NO, SOME, Case, D, F, M, T, gaussian
from tests.laws.primitives import no_rows, small_mlp


def _sequence(batch):
  return gaussian(batch, T, D)


def _positions(x):
  return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])


def _mixture(capacity):
  def build(rngs):
    block = decoder_block(CONFIG, rngs)
    return MixtureOfDepths(block, D, capacity=capacity, rngs=rngs)

  return build


def routed(module, x):
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


def learner_modules(rngs):
  return AdaptiveComputationModule(split_mlp(small_mlp(rngs), M), D, rngs=rngs)


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
  return DuoMlp(Mlp(D, F // 4, rngs=rngs), small_mlp(rngs), D, rngs=rngs)


def _duo_overhead(module, x):
  """The router, and the small layer beside the rounding up of both."""
  rows = lambda m, x: m.small.rows(x)
  return routed(module, x) + flops(rows, module, x)


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


no_halting = "the exits are a while_loop; training goes by every exit"
_static_capacity = "the top-k of training has a static size"
_no_zero = "a capacity of 0 is refused: leave the block out"
_all_selected = "training computes all learners for all tokens"
one_noise = "training draws one noise for the whole batch"

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
    overhead=routed,
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
    overhead=routed,
    static=_static_capacity,
    unless={
      "none": _no_zero,
      "oracle": "top-k against NumPy is in test_mixture_of_depths",
      "gradient": "against finite differences, in the same place",
      "cover": no_rows,
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
    overhead=lambda m, x: 3 * routed(m, x),
    unless={"gradient": no_halting, "poison_gradient": no_halting},
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
    overhead=lambda m, x: 3 * routed(m, x),
  ),
  Case(
    "adaptive_computation_modules",
    "width.adaptive_computation_modules",
    learner_modules,
    _sequence,
    _modules_call,
    full=ALL,
    some=SOME,
    none=NO,
    place=adjust,
    dense=reference.mlp,
    least=lambda m, x: jnp.zeros_like(x),
    poison=_poisoned_modules,
    overhead=routed,
  ),
  Case(
    "adaptive_computation_modules.training",
    "width.adaptive_computation_modules",
    learner_modules,
    _sequence,
    lambda m, x, b: _modules_call(m, x, b, jax.random.key(0)),
    full=ALL,
    some=SOME,
    none=NO,
    place=_certain,
    dense=reference.mlp,
    least=lambda m, x: jnp.zeros_like(x),
    overhead=routed,
    unless={
      "oracle": "it is masked-dense itself",
      "gradient": "it is masked-dense itself",
      "cover": no_rows,
      "poison": _all_selected,
      "poison_gradient": _all_selected,
      "row": one_noise,
      "shard_map": one_noise,
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
      overhead=lambda m, x: m.recursions * routed(m, x),
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
      "cover": no_rows,
      "poison": _both_run,
      "poison_gradient": _both_run,
      "row": one_noise,
      "shard_map": one_noise,
      "cost": _both_run,
    },
  ),
]
