# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of feed-forward modules that are made of experts."""

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.core.cost import flops
from adaptivejax.core.covers import MIN_CHUNK
from adaptivejax.methods.experts import BlockFFN, FactorLLM
from adaptivejax.nn import Mlp, adjust
from tests import reference
from tests.laws.case import ALL, NO, Case, D, F, M, T, gaussian
from tests.laws.primitives import no_rows

E = 12  # experts of a BlockFFN
SPARSE = np.float32(1.2)  # of at most sqrt(E)


def _sequence(batch):
  return gaussian(batch, T, D)


def _call(module, x, budget, key=None):
  del budget
  y, cost, _ = module(x, key=key)
  return y, cost


def _train(module, x, budget):
  return _call(module, x, budget, jax.random.key(0))


def _expert(experts, i):
  return jax.tree.map(lambda a: a[i], experts)


def _block_ffn(rngs):
  return BlockFFN(D, 4, E, chunk=3, rngs=rngs)


def _all_blocks(module, x):
  """All experts; the ReLU makes the weights of some of them 0."""
  s = jnp.maximum(x @ module.gate.kernel.get_value(), 0)
  s = s / jnp.sqrt((s * s).mean(-1, keepdims=True) + 1e-6)
  weights = s * module.scale.get_value()
  return sum(
    weights[..., i, None] * reference.mlp(_expert(module.experts, i), x)
    for i in range(E)
  )


def _poisoned_blocks(module, x):
  """The experts that no token runs at this level are NaN."""
  level = np.float32(2.6)
  active, _ = adjust(module, float(level)).route(
    x @ module.gate.kernel.get_value()
  )
  unused = ~np.asarray(active).any((0, 1))
  assert unused.any() and not unused.all()
  return _spoilt(module, unused), x, level, None


def _spoilt(module, unused):
  module = jax.tree.map(lambda a: a, module)  # a copy
  module.experts = jax.tree.map(
    lambda a: jnp.where(unused.reshape(-1, 1, 1), jnp.nan, a), module.experts
  )
  return module


def _gate_flops(module, x):
  """The router, and a chunk of each expert that is nearly empty."""
  return flops(lambda m, x: m(x), module.gate, x) + _rounding(module)


def _rounding(module):
  rows = jax.ShapeDtypeStruct((2 * MIN_CHUNK, D), jnp.float32)
  count = module.experts.down.kernel.shape[0]
  return count * flops(Mlp.rows, _expert(module.experts, 0), rows)


def _factored(rngs):
  """Its last expert is the last choice of every token."""
  dense = Mlp(D, F, gated=True, activation=jax.nn.silu, rngs=rngs)
  order = np.random.default_rng(0).permutation(F)
  module = FactorLLM(dense, M, order=order, rngs=rngs)
  favoured = jnp.zeros(M).at[-1].set(-30.0)
  module.router.outer.bias.set_value(favoured)
  return module


def _poisoned_factors(module, x):
  return _spoilt(module, np.arange(M) == M - 1), x, np.float32(0), None


def _all_parts(module, x):
  return sum(reference.mlp(_expert(module.experts, i), x) for i in range(M))


def _router_flops(module, x):
  return flops(lambda m, x: m(x), module.router, x) + _rounding(module)


def _taught(module, x):
  teacher = flops(Mlp.rows, module.teacher, x)
  return _router_flops(module, x) + teacher


_all_computed = "training computes all experts for all tokens"
_DENSE = {
  "oracle": "it is masked-dense itself",
  "gradient": "it is masked-dense itself",
  "cover": no_rows,
  "poison": _all_computed,
  "poison_gradient": _all_computed,
  "cost": _all_computed,
}
_zero = lambda module, x: jnp.zeros_like(x)

BLOCKS = [
  Case(
    "block_ffn",
    "experts.block_ffn",
    _block_ffn,
    _sequence,
    _call,
    full=ALL,
    some=SPARSE,
    none=NO,
    place=adjust,
    dense=_all_blocks,
    least=_zero,
    poison=_poisoned_blocks,
    overhead=_gate_flops,
  ),
  Case(
    "block_ffn.training",
    "experts.block_ffn",
    _block_ffn,
    _sequence,
    _train,
    full=ALL,
    some=SPARSE,
    none=NO,
    place=adjust,
    dense=_all_blocks,
    least=_zero,
    overhead=_gate_flops,
    unless=_DENSE,
  ),
  Case(
    "factor_llm",
    "experts.factor_llm",
    _factored,
    _sequence,
    _call,
    full=ALL,
    some=np.float32(0),
    none=NO,
    place=adjust,
    dense=_all_parts,
    least=_zero,
    poison=_poisoned_factors,
    overhead=_router_flops,
  ),
  Case(
    "factor_llm.training",
    "experts.factor_llm",
    _factored,
    _sequence,
    _train,
    full=ALL,
    some=np.float32(0),
    none=NO,
    place=adjust,
    dense=_all_parts,
    least=_zero,
    overhead=_taught,
    unless=_DENSE,
  ),
]
