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
from tests.laws.case import D, F, M, T, gaussian
from tests.laws.experts import asking, call, module_case, poisoned
from tests.laws.primitives import no_rows

E = 12  # experts of a BlockFFN
SPARSE = np.float32(1.2)  # of at most sqrt(E)


def _sequence(batch):
  return gaussian(batch, T, D)


def _train(module, x, budget):
  return call(module, x, budget, jax.random.key(0))


def _block_ffn(rngs):
  return BlockFFN(D, 4, E, chunk=3, rngs=rngs)


def _all_blocks(module, x):
  """All experts; the ReLU makes the weights of some of them 0."""
  s = jnp.maximum(x @ module.gate.kernel.get_value(), 0)
  s = s / jnp.sqrt((s * s).mean(-1, keepdims=True) + 1e-6)
  weights = s * module.scale.get_value()
  return reference.experts(module.experts, x, weights)


def _poisoned_blocks(module, x):
  """The experts that no token runs at this level are NaN."""
  level = np.float32(2.6)
  active, _ = adjust(module, float(level)).route(
    x @ module.gate.kernel.get_value()
  )
  unused = ~np.asarray(active).any((0, 1))
  assert unused.any() and not unused.all()
  return poisoned(module, unused), x, level, None


def _factored(rngs):
  """Its last expert is the last choice of every token."""
  dense = Mlp(D, F, gated=True, activation=jax.nn.silu, rngs=rngs)
  order = np.random.default_rng(0).permutation(F)
  module = FactorLLM(dense, M, order=order, rngs=rngs)
  favoured = jnp.zeros(M).at[-1].set(-30.0)
  module.router.outer.bias.set_value(favoured)
  return module


def _poisoned_factors(module, x):
  return poisoned(module, np.arange(M) == M - 1), x, np.float32(0), None


def _all_parts(module, x):
  return reference.experts(module.experts, x, jnp.ones((*x.shape[:-1], M)))


def _asking(module, x):
  """A chunk of each expert is nearly empty."""
  return asking(module, x, 2 * MIN_CHUNK)


def _taught(module, x):
  return _asking(module, x) + flops(Mlp.rows, module.teacher, x)


_all_computed = "training computes all experts for all tokens"
_DENSE = {
  "oracle": "it is masked-dense itself",
  "gradient": "it is masked-dense itself",
  "cover": no_rows,
  "poison": _all_computed,
  "poison_gradient": _all_computed,
  "cost": _all_computed,
}

BLOCKS = [
  module_case(
    "block_ffn",
    _block_ffn,
    _sequence,
    _all_blocks,
    some=SPARSE,
    poison=_poisoned_blocks,
    overhead=_asking,
  ),
  module_case(
    "block_ffn.training",
    _block_ffn,
    _sequence,
    _all_blocks,
    call=_train,
    some=SPARSE,
    overhead=_asking,
    unless=_DENSE,
  ),
  module_case(
    "factor_llm",
    _factored,
    _sequence,
    _all_parts,
    some=np.float32(0),
    poison=_poisoned_factors,
    overhead=_asking,
  ),
  module_case(
    "factor_llm.training",
    _factored,
    _sequence,
    _all_parts,
    call=_train,
    some=np.float32(0),
    overhead=_taught,
    unless=_DENSE,
  ),
]
