# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of experts over devices: here their rule of capacity.

How experts are spread is no budget and needs a mesh: `test_expert_parallel` and
`test_spread` hold it to eight devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptivejax.methods.experts import TutelRouter
from adaptivejax.nn import (
  MixtureOfExperts,
  Mlp,
  Router,
  Routing,
  adjust,
  stacked,
)
from tests import reference
from tests.laws.case import ALL, NO, Case, D, F, M, T, gaussian

HALF = np.float32(0.5)


class _TopTwo(nnx.Module):
  """Two of the first M - 1 experts; nobody chooses the last."""

  def __init__(self, rngs):
    self.scorer = Router(D, M, rngs=rngs)
    self.scorer.outer.bias.set_value(jnp.zeros(M).at[-1].set(-30.0))

  def gates(self, x):
    return jax.nn.softmax(self.scorer(x.astype(jnp.float32)))

  def __call__(self, x, live, key):
    weights, experts = jax.lax.top_k(self.gates(x), 2)
    return Routing(experts, weights, jnp.float32(0), jnp.float32(0))


def _mixture(rngs):
  experts = stacked(lambda r: Mlp(D, F // M, rngs=r), M, rngs)
  router = TutelRouter(_TopTwo(rngs), M, factor=0.0, prioritized=True)
  return MixtureOfExperts(router, experts)


def _call(module, x, budget):
  del budget
  y, cost, _ = module(x)
  return y, cost


def _best_two(module, x):
  """All experts, the gates of the others 0."""
  gates = module.router.router.gates(x)
  least = jnp.sort(gates, axis=-1)[..., -2:-1]
  gates = jnp.where(gates >= least, gates, 0)
  gates = gates / gates.sum(-1, keepdims=True)
  one = lambda i: jax.tree.map(lambda a: a[i], module.experts)
  return sum(gates[..., i, None] * reference.mlp(one(i), x) for i in range(M))


def _poisoned_expert(module, x):
  module = jax.tree.map(lambda a: a, module)  # a copy
  spoil = lambda a: a.at[-1].set(jnp.nan)
  module.experts = jax.tree.map(spoil, module.experts)
  return module, x, HALF, None


PARALLEL = [
  Case(
    "tutel",
    "experts.tutel",
    _mixture,
    lambda batch: gaussian(batch, T, D),
    _call,
    full=ALL,
    some=HALF,
    none=NO,
    place=adjust,
    dense=_best_two,
    least=lambda module, x: jnp.zeros_like(x),
    poison=_poisoned_expert,
    unless={
      "row": "the items of a batch share the capacity",
      "shard_map": "the items of a device share the capacity",
      "cost": "what finds no room is dropped, and full is two of four",
    },
  ),
]
