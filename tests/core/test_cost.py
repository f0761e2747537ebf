# SPDX-License-Identifier: Apache-2.0
"""Law: the returned cost is what an independent recount finds."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from adaptivejax import core
from adaptivejax.core import Cost, Signals, flops
from tests.core import brute

N, D, E = 37, 3, 5
COVERS = {
  "default": None,
  "ladder": core.ladder(4, 16),
  "tiles": core.tiles(6),
  "coins": core.coins(16, 8, 2),
}
X = jnp.linspace(-1, 1, N * D).reshape(N, D)
W = jnp.linspace(-1, 1, D * E).reshape(D, E)


def close(got, want):
  chex.assert_trees_all_close(got, Cost(*map(jnp.float32, want)), rtol=1e-6)


def recount(kind, count):
  if kind == "ladder":
    return brute.ladder_slots(count, [4, 16])
  cover = COVERS[kind] or core.default_cover(N)
  return brute.coin_slots(count, cover.sizes)


@pytest.mark.parametrize("kind", COVERS)
def test_cost_is_the_recount_of_rows_seen_by_f(kind):
  """The host counts the rows that really enter `f`."""
  seen = []

  def count_rows(rows):
    seen.append(len(rows))
    return np.zeros((), np.float32)

  def f(rows, w):
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return rows @ w + jax.pure_callback(count_rows, shape, rows)

  cover = COVERS[kind]
  run = jax.jit(
    lambda mask: core.bucketed(f, X, mask, W, keep=False, cover=cover)
  )
  random = np.random.default_rng(0)
  row = 2 * D * E
  most = max(recount(kind, count) for count in range(N + 1))
  for count in (0, 1, 2, 4, 5, 15, 16, 17, 30, N):
    seen.clear()
    mask = jnp.asarray(random.permutation(N) < count)
    _, cost = jax.block_until_ready(run(mask))
    slots = recount(kind, count)
    assert sum(seen) == slots
    close(cost, (slots * row, N * row, count, slots, 0, most * row))


def test_cost_of_masked_is_dense():
  mask = jnp.arange(N) < 5
  _, cost = core.masked(jnp.matmul, X, mask, W, keep=False)
  row = 2 * D * E
  close(cost, (N * row, N * row, 5, N, 0, N * row))


@pytest.mark.parametrize("per_example", [False, True], ids=["shared", "own"])
def test_costs_under_vmap_sum_to_what_ran(per_example):
  random = np.random.default_rng(0)
  masks = jnp.asarray(random.random((4, N)) < 0.3)
  w = jnp.stack([W] * 4) if per_example else W
  cover = core.coins(16, 8, 2)
  op = functools.partial(core.bucketed, jnp.matmul, keep=False, cover=cover)
  axes = (None, 0, 0 if per_example else None)
  _, cost = jax.jit(jax.vmap(op, axes))(X, masks, w)
  chex.assert_tree_shape_prefix(cost, (4,))
  counts = masks.sum(1).tolist()
  groups = counts if per_example else [sum(counts)]
  slots = sum(brute.coin_slots(count, cover.sizes) for count in groups)
  row = 2 * D * E
  most = max(brute.coin_slots(count, cover.sizes) for count in range(N + 1))
  total = (slots * row, 4 * N * row, sum(counts), slots, 0, 4 * most * row)
  close(cost.total(), total)


def test_cost_carries_no_gradient():
  spent = lambda w: core.bucketed(jnp.matmul, X[:, :1], X[:, 0] > 0, w)[1].spent
  assert float(jax.grad(spent)(jnp.ones((1, 1)))[0, 0]) == 0


def test_cost_is_a_monoid():
  a, b = Cost(1.0, 4.0, 2.0, 3.0, 0.0, 5.0), Cost.dense(8.0, 5)
  close(a + b, (9, 12, 7, 8, 0, 13))
  close(a + Cost.zero(), a)
  chex.assert_trees_all_close((a + b) + a, a + (b + a))
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), b, b)
  close(stacked.total(), b + b)
  assert float((a + b).share) == 0.75
  assert float(Cost.zero().share) == 1  # nothing was to be saved
  assert all(leaf.dtype == jnp.float32 for leaf in Cost.dense(8.0, 5))
  assert Signals.none() == (1, 0, (), ())


MATRIX = jnp.ones((4, 6)), jnp.ones((6, 5))
BATCH = jnp.ones((3, 4, 6)), jnp.ones((3, 6, 5))
IMAGE, KERNEL = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 6, 4))
MATMUL = 2 * 4 * 6 * 5


def conv(groups, x, kernel):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (1, 1),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


def repeat(a, b):
  step = lambda c, _: (c + (a @ b).sum() * c, None)
  return jax.lax.scan(step, 0.0, length=7)[0]


def branch(a, b):
  big, small = lambda: (a @ b).sum(), lambda: (a[:1] @ b).sum()
  return jax.lax.cond(a.sum() > 0, big, small)


def loop(a, b):
  return jax.lax.fori_loop(0, jnp.int32(a[0, 0]), lambda _, c: c + a @ b, a @ b)


FLOPS = {
  "matmul": (jnp.matmul, MATRIX, MATMUL),
  "batched": (jnp.matmul, BATCH, 3 * MATMUL),
  "jit": (jax.jit(jnp.matmul), MATRIX, MATMUL),
  "checkpoint": (jax.checkpoint(jnp.matmul), MATRIX, MATMUL),
  "activation": (lambda a, b: jax.nn.silu(a @ b) * 2, MATRIX, MATMUL),
  "grad": (jax.grad(lambda a, b: (a @ b).sum(), (0, 1)), MATRIX, 3 * MATMUL),
  "scan": (repeat, MATRIX, 7 * MATMUL),
  "cond": (branch, MATRIX, MATMUL),
  "while": (loop, MATRIX, 2 * MATMUL),
  "conv": (functools.partial(conv, 1), (IMAGE, KERNEL), 2 * 72 * 4 * 54),
  "groups": (
    functools.partial(conv, 2),
    (IMAGE, KERNEL[:, :, :3]),
    2 * 72 * 4 * 27,
  ),
  "add": (jnp.add, MATRIX[:1] * 2, 0),
}


@pytest.mark.parametrize("f, args, want", FLOPS.values(), ids=FLOPS)
def test_flops_by_hand(f, args, want):
  assert flops(f, *args) == want


def test_flops_need_only_shapes():
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in MATRIX]
  assert flops(jnp.matmul, *shapes) == MATMUL


def test_flops_of_all_devices():
  """The body of a `shard_map` is what one of them does."""
  mesh = AbstractMesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
  f = jax.shard_map(
    lambda x, w: x @ w,
    mesh=mesh,
    in_specs=(P("a"), P()),
    out_specs=P("a"),
    axis_names={"a"},
  )
  x, w = jnp.ones((8, 3)), jnp.ones((3, 5))
  assert flops(f, x, w) == flops(jnp.matmul, x, w) == 2 * 8 * 3 * 5
