# SPDX-License-Identifier: Apache-2.0
"""Law: a TPU makes of items and experts what all others make."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from adaptivejax.core.dispatch import NOBODY, dispatch
from adaptivejax.core.expert_executor import KEPT
from adaptivejax.core.expert_kernel import kernel_executor
from adaptivejax.core.experts import expert_apply, expert_apply_dense
from adaptivejax.core.rowwise import RowFunction
from pallas_kernels.grouped_matmul import grouped_matmul
from tests.core.test_experts import (
  KEYS,
  PARAMS,
  ROUTES,
  WEIGHTS,
  D,
  E,
  N,
  X,
  brute,
  close,
)


def by_kernel(experts, together, chunks=lambda *args: args):
  """The kernel's way of the same, on CPU."""

  def run(x, weights, params):
    plan = dispatch(experts, weights, E)
    leaves, tree = jax.tree.flatten(params)
    row = jax.ShapeDtypeStruct((N, D), jnp.float32)
    product = functools.partial(grouped_matmul, interpret=True)
    function = RowFunction({}, {}, len(leaves), None, [row])
    go = kernel_executor(together, function, tree, chunks, product)
    return go(leaves, x, plan)[0]

  return run


@pytest.mark.parametrize("name", ["some", "none", "dead expert"])
def test_the_kernel_is_the_same(name):
  """Values, gradients and what does not leak, as the TPU runs it."""
  experts = jnp.asarray(ROUTES[name])
  together = lambda r, p, product: product(
    jnp.tanh(product(r, p["up"])), p["down"]
  )
  run = by_kernel(experts, together)
  idle = (experts == NOBODY).all(1)[:, None]
  x = jnp.where(idle, jnp.nan, X)
  close(run(x, WEIGHTS, PARAMS), brute(X, WEIGHTS, PARAMS, experts))
  loss = lambda f: lambda *args: jnp.sin(f(*args)).sum()
  grads = jax.grad(loss(run), argnums=(0, 1, 2))(x, WEIGHTS, PARAMS)
  twin = loss(lambda *args: brute(*args, experts))
  jax.tree.map(
    close, grads, jax.grad(twin, argnums=(0, 1, 2))(X, WEIGHTS, PARAMS)
  )
  twice = jax.vmap(lambda x: run(x, WEIGHTS, PARAMS))(jnp.stack([X, 2 * X]))
  close(twice[1], brute(2 * X, WEIGHTS, PARAMS, experts))


@pytest.mark.parametrize(("used", "factor"), [(KEPT * N, 1), (KEPT * N + 1, 2)])
def test_the_kernel_has_slots_enough_or_leaves_it(used, factor):
  """To the chunks, which here make twice as much."""
  experts = np.where(np.arange(N * E) < used, np.arange(N * E) % E, NOBODY)
  experts = jnp.asarray(experts.reshape(N, E))
  weights = jax.random.normal(KEYS[3], (N, E))

  def chunks(theta, x, plan):
    f = lambda rows, p: 2 * jnp.tanh(rows @ p)
    y, cost = expert_apply(f, x, plan, theta[0])
    return y, cost.capacity

  together = lambda r, w, product: jnp.tanh(product(r, w))
  w = PARAMS["up"][:, :, :D]
  loss = lambda f: lambda *args: jnp.sin(f(*args)).sum()
  run = by_kernel(experts, together, chunks)

  def twin(x, weights, w):
    plan = dispatch(experts, weights, E)
    f = lambda rows, w: factor * jnp.tanh(rows @ w)
    return expert_apply_dense(f, x, plan, w)[0]

  grad = lambda f: jax.value_and_grad(loss(f), argnums=(0, 1, 2))
  got, wanted = (jax.jit(grad(f))(X, weights, w) for f in (run, twin))
  jax.tree.map(close, got, wanted)


@pytest.mark.parametrize(("data", "kernels"), [(P("data"), 4), (P(), 0)])
def test_the_kernel_inside_shard_map(data, kernels):
  """A TPU runs it where all differs over the same axes, else the chunks.

  With a gradient there are four: y, y again, dx and dw.
  """
  mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
  together = lambda r, w, product: jnp.tanh(product(r, w))

  def local(x, weights, w, experts):
    w = jax.lax.pcast(w, "data", to="varying")
    f = lambda rows, w: jnp.tanh(rows @ w)
    plan = dispatch(experts, weights, E)
    return expert_apply(f, x, plan, w, together=together)[0]

  specs = data, data, P(), data
  run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))
  loss = lambda *args: jnp.sin(run(*args)).sum()
  f = jax.grad(loss, argnums=(0, 1, 2)) if kernels else loss
  args = X, WEIGHTS, PARAMS["up"], jnp.asarray(ROUTES["some"])
  module = jax.export.export(jax.jit(f), platforms=["tpu"])(*args)
  assert module.mlir_module().count("@tpu_custom_call") == kernels
