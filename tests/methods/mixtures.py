# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts small enough to go through by hand, and golden ones.

The brute force runs in f64, token by token and choice by choice.

Axes: B batch, T tokens, D features, F hidden, E experts, K choices.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import special

from adaptivejax.nn import MixtureOfExperts, Mlp, stacked
from tests.methods.host import shaken

B, T, D, F, E = 2, 12, 16, 24, 8
X = jax.random.normal(jax.random.key(0), (B, T, D))
KEY = jax.random.key(5)
LIVE = jnp.arange(T) < jnp.array([[7], [10]])
call = jax.jit(lambda module, x, live=None, key=None: module(x, live, key))
GOLDENS = Path(__file__).parents[1] / "goldens" / "experts.npz"


@functools.cache
def golden(block):
  """The arrays of one block of `goldens/experts.npz`, by name."""
  with np.load(GOLDENS) as file:
    own = [name for name in file.files if name.startswith(f"{block}/")]
    return SimpleNamespace(**{n.partition("/")[2]: file[n] for n in own})


@functools.cache
def experts(count=E, *, hidden=F, activation=jax.nn.silu, seed=0):
  """Gated experts, their parameters stacked."""
  make = lambda rngs: Mlp(
    D, hidden, gated=True, activation=activation, rngs=rngs
  )
  return stacked(make, count, nnx.Rngs(seed))


def golden_experts(g):
  """The experts of a golden block."""
  gated = hasattr(g, "gate")
  activation = jax.nn.silu if gated else jax.nn.relu
  make = lambda rngs: Mlp(D, F, gated=gated, activation=activation, rngs=rngs)
  return with_weights(stacked(make, len(g.up), nnx.Rngs(0)), vars(g))


def golden_mixture(block, router, **settings):
  """The golden experts behind `router(D, E, ...)`, and the golden arrays."""
  g = golden(block)
  made = set_gate(router(D, E, rngs=nnx.Rngs(0), **settings), g.router)
  return MixtureOfExperts(made, golden_experts(g)), g


def with_weights(mlp, arrays, prefix=""):
  """The layer with the kernels `up`, `gate` and `down` of `arrays`."""
  for name in ("up", "gate", "down"):
    if getattr(mlp, name) is not None:
      kernel = jnp.asarray(arrays[prefix + name])
      getattr(mlp, name).kernel.set_value(kernel)
  return mlp


def copy(module):
  """The same parameters, to change apart."""
  return jax.tree.map(lambda a: a, module)


def set_gate(router, kernel):
  """The router, choosing by this kernel [D, E]."""
  router = copy(router)
  router.gate.kernel.set_value(jnp.asarray(kernel, jnp.float32))
  return router


@functools.cache
def mixture(router, count=E, seed=0, **settings):
  """Shaken experts behind `router(D, E, ...)`."""
  made = router(D, count, rngs=nnx.Rngs(seed), **settings)
  return shaken(MixtureOfExperts(made, experts(count)), seed)


def logits(gate, x):
  """x W, f64."""
  kernel = np.asarray(gate.kernel.get_value(), np.float64)
  return np.asarray(x, np.float64) @ kernel


def probabilities(gate, x):
  """softmax(x W), f64."""
  return special.softmax(logits(gate, x), -1)


def only_best(scores, k):
  """The k best scores of each row, 0 for the others."""
  chosen = np.zeros_like(scores)
  np.put_along_axis(chosen, best_of(scores, k), 1, -1)
  return chosen * scores


def run_expert(mlp, e, x):
  """Expert e on one token, f64; e None is a layer that is not stacked."""
  of = lambda part: np.asarray(part.kernel.get_value(), np.float64)
  pick = (lambda part: of(part)) if e is None else (lambda part: of(part)[e])
  up = x @ pick(mlp.up)
  if mlp.gate is not None:
    gate = x @ pick(mlp.gate)
    return (gate * special.expit(gate) * up) @ pick(mlp.down)
  return np.maximum(up, 0) @ pick(mlp.down)


def brute_force(mlp, x, gates):
  """sum_e gates[..., e] E_e(x), running the experts of a gate other than 0."""
  x, y = np.asarray(x, np.float64), np.zeros(x.shape)
  for index in np.ndindex(x.shape[:-1]):
    for e in np.nonzero(gates[index])[0]:
      y[index] += gates[index][e] * run_expert(mlp, e, x[index])
  return y


def gates_of(routing, count=E):
  """What a routing says, as a dense matrix [*N, E]."""
  chosen, weights = map(np.asarray, (routing.experts, routing.weights))
  gates = np.zeros((*chosen.shape[:-1], count))
  for index in np.ndindex(chosen.shape):
    if chosen[index] >= 0:
      gates[index[:-1]][chosen[index]] += weights[index]
  return gates


def best_of(scores, k):
  """The k best of each row, the lower index first at ties."""
  return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def assert_golden(module, g, *, tolerance=1e-5):
  """Output and gradients are those of transformers."""

  def loss(module, x):
    y = module(x)[0]
    return jnp.sin(y).sum(), y

  grads, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
    module, jnp.asarray(g.x)
  )
  gate = getattr(grads[0], "router", grads[0]).gate
  got = {"y": y, "dx": grads[1], "drouter": gate.kernel.get_value()}
  for name, value in got.items():
    want = getattr(g, name)
    scale = np.abs(want).max()
    np.testing.assert_allclose(
      value, want, rtol=0, atol=tolerance * scale, err_msg=name
    )
